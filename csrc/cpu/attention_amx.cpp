// The matrix-tile attention on the AMX instructions of Intel processors since Sapphire Rapids.
#include "cpu/attention_amx_kernel.h"
#include "cpu/tiles_amx.h"

namespace kvkernels {

const AttentionKernel* amx_kernel(DType dtype, HeadDims dims) {
  return tile_kernel<AmxTiles, attend_codes_amx>(dtype, dims);
}

}  // namespace kvkernels
