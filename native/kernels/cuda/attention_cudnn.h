// Causal bf16 attention by cuDNN's graph API; where it does not serve, the own kernels do
// (attention.cuh). Elements are bf16 whatever TmElement is.
//
//   order   cuDNN's own, the same bits for the same arguments, card and cuDNN: the backward's
//           deterministic attribute is on, and chunks run in one order. In free mode it is off:
//           queries' gradients are then added in the order in which blocks end
//   needs   cuDNN 9.12 or newer; head size a multiple of 8 up to 128 (256 on Hopper); strides
//           multiples of 8 and pointers of 16 bytes. Packs of unequal documents: Hopper and
//           Blackwell (sm_90, sm_10x). TmAttention.scratch of scratch_bytes().
//   source  written from cuDNN's and its frontend's documentation
#pragma once
#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/backend.h"

namespace tunemesh::cuda {

class CudnnAttention {
 public:
  struct Options {
    std::string library_folder;
    cudaStream_t stream;
    bool is_free;
  };
  // Null, and one line in `why`, where there is no fit cuDNN or the plugin was built without it.
  static std::unique_ptr<CudnnAttention> open(const Options& options, std::string* why);
  virtual ~CudnnAttention() = default;

  virtual std::string version() const = 0;  // "9.19.0"; bits depend on it
  // Bytes of TmAttention.scratch: for the backward of the job's full packs at once, 1.5 GiB at most
  // and then in parts; where one document with one key/value head takes more than that, what the
  // forward takes (such documents' backward is not served).
  virtual size_t scratch_bytes(const TmAttentionJob& job) const = 0;
  // Does nothing and answers false where the call is not served; builds plans as it needs them.
  virtual bool supports(const TmAttention& args) = 0;
  virtual bool supports(const TmAttentionBackward& args) = 0;
  virtual bool forward(const TmAttention& args) = 0;
  virtual bool backward(const TmAttentionBackward& args) = 0;
  // While the stream is captured, forward and backward throw TM_BAD_ARGUMENT for what can't be: a
  // plan that was not built and checked before, unequal documents in several chunks. Plans that
  // were captured live until this is called.
  virtual void forget_recorded() = 0;
  // Why the last call was not served, for the log; and the most workspace a plan took.
  virtual const std::string& refusal() const = 0;
  virtual size_t largest_workspace() const = 0;
};

}  // namespace tunemesh::cuda
