// The codec's loops for any processor.
#define TM_CODEC_NAMESPACE codec_generic
#include "engine/codec_loops.h"
