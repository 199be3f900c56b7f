// Stands in for NVRTC's header while cudnn_graph.cc includes cuDNN's frontend, which names these in
// an engine for fused norms that is never used here: each call fails. So nothing of NVRTC, whose
// wheel is ninety megabytes, is needed to build.
#pragma once
#include <stddef.h>

typedef struct _nvrtcProgram* nvrtcProgram;
typedef enum { NVRTC_SUCCESS = 0, NVRTC_ERROR_INTERNAL_ERROR = 11 } nvrtcResult;

inline nvrtcResult nvrtcCreateProgram(nvrtcProgram*, const char*, const char*, int,
                                      const char* const*, const char* const*) {
  return NVRTC_ERROR_INTERNAL_ERROR;
}
inline nvrtcResult nvrtcDestroyProgram(nvrtcProgram*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline nvrtcResult nvrtcCompileProgram(nvrtcProgram, int, const char* const*) {
  return NVRTC_ERROR_INTERNAL_ERROR;
}
inline nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram, size_t*) {
  return NVRTC_ERROR_INTERNAL_ERROR;
}
inline nvrtcResult nvrtcGetProgramLog(nvrtcProgram, char*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline nvrtcResult nvrtcGetCUBINSize(nvrtcProgram, size_t*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline nvrtcResult nvrtcGetCUBIN(nvrtcProgram, char*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline nvrtcResult nvrtcGetPTXSize(nvrtcProgram, size_t*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline nvrtcResult nvrtcGetPTX(nvrtcProgram, char*) { return NVRTC_ERROR_INTERNAL_ERROR; }
inline const char* nvrtcGetErrorString(nvrtcResult) { return "NVRTC is not built in"; }
