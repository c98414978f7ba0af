// The codecs for AVX2.
#include "cpu/codec_lanes_avx2.h"

#include "cpu/codec_kernels.h"

namespace kvkernels {

CodecKernels avx2_codec_kernels(DType dtype) { return kernels_for(dtype); }

}  // namespace kvkernels
