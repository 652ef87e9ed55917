// csrc/emulate/runtime.cpp: see runtime.h. A failed launch is an error code with the emulator's message as its text.
#include "emulate/runtime.h"

#include <cuda_runtime_api.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>

namespace emulate {

Schedule schedule;

namespace {
int processors = 4, major = 8;  // of the device that kernels' hosts see
cudaError_t last_error = cudaSuccess;
char message[1000] = "no error";
std::map<const void*, size_t>& granted() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}
}  // namespace

void set_failure(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof(message), format, list);
  va_end(list);
  last_error = cudaErrorLaunchFailure;
#if defined(EMULATE_TSAN)  // fibers that stopped half way would confuse the sanitizer's own report
  fprintf(stderr, "emulate: %s\n", message);
  _Exit(3);
#endif
}

size_t allowed_shared(const void* kernel) {
  const auto found = granted().find(kernel);
  return found == granted().end() ? 0 : found->second;
}

}  // namespace emulate

extern "C" {

// order: 0 forward, 1 reverse, 2 random by `seed`. late: cp.async lands when it is waited for, else at once.
__attribute__((visibility("default"))) void ramify_emulate(int order, uint64_t seed, int late) {
  const bool coarse = emulate::schedule.coarse;
  emulate::schedule = {order, late != 0, coarse, seed};
}

// The thread sanitizer forgets what more than some 250 threads did. Coarse, it takes a block for one thread: races between the
// blocks of a launch show however large they are, those inside a block do not.
__attribute__((visibility("default"))) void ramify_emulate_coarse(int coarse) { emulate::schedule.coarse = coarse != 0; }

// How many multiprocessors the device has, and its compute capability: kernels' hosts choose grids and kernels by them.
__attribute__((visibility("default"))) void ramify_emulate_device(int processors, int major) {
  emulate::processors = processors, emulate::major = major;
}

cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = emulate::last_error;
  emulate::last_error = cudaSuccess;
  return error;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulate::message : error == cudaSuccess ? "no error" : "an error of the CUDA runtime";
}
cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  if (what == cudaFuncAttributeMaxDynamicSharedMemorySize) emulate::granted()[kernel] = size_t(value);
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t CUDARTAPI cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? emulate::processors : what == cudaDevAttrComputeCapabilityMajor ? emulate::major : 0;
  return cudaSuccess;
}

}  // extern "C"
