// The codec's loops for AVX-512. Shared headers come first, so that none of their code is compiled
// for it.
#include "engine/codec_table.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define TM_CODEC_NAMESPACE codec_avx512
#include "engine/codec_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
