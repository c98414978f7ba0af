// Codes on matrix tiles whose instructions are emulated.
#include "cpu/attention_amx_codes.h"
#include "cpu/tiles_emulated.h"

namespace kvkernels {

void attend_codes_amx_emulated(const AttentionTile& tile, const TileResult* results) {
  attend_codes<EmulatedTiles>(tile, results);
}

}  // namespace kvkernels
