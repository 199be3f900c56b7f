#include "kernels/cuda/side_copies.h"

#include "kernels/cuda/card_memory.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/guard.h"

namespace tunemesh::cuda {
namespace {

void check_lane(size_t lane) {
  if (lane < TM_COPY_LANES) return;
  refuse("copy lane ", lane, " is not there; use 0 to ", TM_COPY_LANES - 1);
}

TmStatus start_copy(TmContext* context, const TmSideCopy* args) {
  return guarded(context, [&] {
    check_lane(args->lane);
    context->side_copies().start(*args, context->stream());
  });
}

TmStatus await_copy(TmContext* context, size_t lane) {
  return guarded(context, [&] {
    check_lane(lane);
    context->side_copies().await(lane, context->stream());
  });
}

TmStatus finish_copy(TmContext* context, size_t lane) {
  return guarded(context, [&] {
    check_lane(lane);
    context->side_copies().finish(lane);
  });
}

size_t free_bytes(TmContext* context) {
  size_t free = 0, total = 0;
  guarded(context, [&] { CUDA_CHECK(cudaMemGetInfo(&free, &total)); });
  return free;
}

size_t overhead_bytes(TmContext* context, size_t* late_bytes) {
  *late_bytes = kLazyModuleBytes;
  return context->overhead_bytes();
}

}  // namespace

void SideCopies::start(const TmSideCopy& copy, cudaStream_t operations) {
  if (copy.at_once == 0) {
    CUDA_CHECK(cudaEventRecord(given_.get(), operations));
    CUDA_CHECK(cudaStreamWaitEvent(stream_.get(), given_.get(), 0));
  }
  const cudaMemcpyKind kind = copy.to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  CUDA_CHECK(cudaMemcpyAsync(copy.to, copy.from, copy.num_bytes, kind, stream_.get()));
  CUDA_CHECK(cudaEventRecord(ended_[copy.lane].get(), stream_.get()));
}

void SideCopies::await(size_t lane, cudaStream_t operations) {
  CUDA_CHECK(cudaStreamWaitEvent(operations, ended_[lane].get(), 0));
}

void SideCopies::finish(size_t lane) { CUDA_CHECK(cudaEventSynchronize(ended_[lane].get())); }

void fill_side_copies(TmBackend& backend) {
  backend.start_copy = start_copy;
  backend.await_copy = await_copy;
  backend.finish_copy = finish_copy;
  backend.free_bytes = free_bytes;
  backend.overhead_bytes = overhead_bytes;
}

}  // namespace tunemesh::cuda
