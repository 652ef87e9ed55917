// What the CUDA driver says about this machine, and one kernel to show that a launch works.
// Nothing here runs at load: a machine without a GPU imports the module and gets error codes.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void fill_kernel(uint32_t* out, int count, uint32_t value) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = value + i;
}

}  // namespace

extern "C" {

// Number of devices into *count; returns a cudaError_t.
int ramify_cuda_devices(int* count) { return cudaGetDeviceCount(count); }

// Version of the driver and of the linked runtime, 1000 * major + 10 * minor, 0 where there is none; returns a cudaError_t.
int ramify_cuda_versions(int* driver, int* runtime) {
  const cudaError_t error = cudaDriverGetVersion(driver);
  return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}

// The runtime's words for a cudaError_t.
const char* ramify_cuda_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// out[i] = value + i on `stream`; returns a cudaError_t.
int ramify_cuda_fill(uint32_t* out, int count, uint32_t value, void* stream) {
  if (count < 1) return cudaErrorInvalidValue;
  fill_kernel<<<(count + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(out, count, value);
  return cudaGetLastError();
}

}  // extern "C"
