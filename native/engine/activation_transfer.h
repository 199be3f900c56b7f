// Saved activations of offloaded layers on their way to host memory and back, beside the products.
//
// Two places on the device take the offloaded layers in turn. In forward a layer's copy to the host
// starts when it is computed, and its place is written again two offloaded layers further up. In
// backward the layer two further down comes back into a place as soon as that is read for the last
// time.
#pragma once
#include "engine/decoder_layer.h"

namespace tunemesh {

// Around each layer of a forward that a backward follows. All its copies are awaited within it.
void await_place(const Pass& pass, size_t layer);
void send_layer(const Pass& pass, size_t layer);
// Around each layer of the backward; likewise.
void await_layer(const Pass& pass, size_t layer);
void fetch_layer_below(const Pass& pass, size_t layer);

}  // namespace tunemesh
