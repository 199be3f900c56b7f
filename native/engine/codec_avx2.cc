// The codec's loops for AVX2. Shared headers come first, so that none of their code is compiled for
// it.
#include "engine/codec_table.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define TM_CODEC_NAMESPACE codec_avx2
#include "engine/codec_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
