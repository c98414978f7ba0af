// The codecs for AVX-512.
#include "cpu/codec_lanes_avx512.h"

#include "cpu/codec_kernels.h"

namespace kvkernels {

CodecKernels avx512_codec_kernels(DType dtype) { return kernels_for(dtype); }

}  // namespace kvkernels
