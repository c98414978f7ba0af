// Linear layers of bfloat16 on the AMX instructions of Intel processors since Sapphire Rapids.
#include "cpu/linear_amx_kernel.h"
#include "cpu/tiles_amx.h"

namespace kvkernels {

LinearKernel amx_linear(DType dtype) { return tile_kernel<AmxTiles>(dtype); }

}  // namespace kvkernels
