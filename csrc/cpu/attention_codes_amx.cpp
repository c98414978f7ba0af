// Codes on the AMX instructions of Intel processors since Sapphire Rapids.
#include "cpu/attention_amx_codes.h"
#include "cpu/tiles_amx.h"

namespace kvkernels {

void attend_codes_amx(const AttentionTile& tile, const TileResult* results) {
  attend_codes<AmxTiles>(tile, results);
}

}  // namespace kvkernels
