// Decodes to bfloat16: with AVX512-BF16 rounding to it is one instruction, with AVX-512 alone ten.
#include "cpu/codec_lanes_avx512.h"

#include "cpu/codec_kernels.h"

namespace kvkernels {

CodecDecode avx512_bf16_codec_decode() { return decode_side<DType::kBFloat16>; }

}  // namespace kvkernels
