// Attention of the one newest token over the rows of the key/value cache.
#pragma once
#include "engine/decoder_layer.h"

namespace tunemesh {

// saved.attention[0] = attention of saved.q[0] to cache rows up to and with pass.cache_start.
// Runs on the host: the cache is the CPU backend's memory. float32, keys in ascending order.
void decode_attention(const Pass& pass, const LayerActivations& saved);

}  // namespace tunemesh
