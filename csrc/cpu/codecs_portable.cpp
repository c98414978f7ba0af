// The codecs for any processor.
#include "cpu/codec_lanes_portable.h"

#include "cpu/codec_kernels.h"

namespace kvkernels {

CodecKernels portable_codec_kernels(DType dtype) { return kernels_for(dtype); }

}  // namespace kvkernels
