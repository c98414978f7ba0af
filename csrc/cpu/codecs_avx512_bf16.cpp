// Decodes to bfloat16, which is one instruction where AVX-512 alone takes ten.
#include "cpu/codec_lanes_avx512.h"

#include "cpu/codec_kernels.h"

namespace kvkernels {

CodecDecode avx512_bf16_codec_decode() { return decode_side<DType::kBFloat16>; }

}  // namespace kvkernels
