// Linear layers on matrix tiles with their instructions emulated.
#include "cpu/linear_amx_kernel.h"
#include "cpu/tiles_emulated.h"

namespace kvkernels {

LinearKernel amx_emulated_linear(DType dtype) { return tile_kernel<EmulatedTiles>(dtype); }

}  // namespace kvkernels
