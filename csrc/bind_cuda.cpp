// Python module ramify._cuda: addresses, sizes and a stream in, error codes out. No torch headers, and no CUDA headers either.
#include <pybind11/pybind11.h>

#include <cstdint>

extern "C" {
int ramify_cuda_devices(int* count);
int ramify_cuda_versions(int* driver, int* runtime);
const char* ramify_cuda_message(int error);
int ramify_cuda_fill(uint32_t* out, int count, uint32_t value, void* stream);
}

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ramify: addresses, sizes and a stream in, a cudaError_t out.";
  m.def(
      "probe",
      [] {
        int devices = 0, driver = 0, runtime = 0;
        const int error = ramify_cuda_devices(&devices);
        ramify_cuda_versions(&driver, &runtime);
        py::dict answer;
        answer["error"] = error;
        answer["message"] = ramify_cuda_message(error);
        answer["devices"] = error == 0 ? devices : 0;
        answer["driver"] = driver;
        answer["runtime"] = runtime;
        return answer;
      },
      "The driver's answer: error, message, devices, driver and runtime version (1000 * major + 10 * minor).");
  m.def("message", &ramify_cuda_message, "The runtime's words for an error code.");
  m.def(
      "fill",
      [](uintptr_t out, int count, uint32_t value, uintptr_t stream) {
        return ramify_cuda_fill(reinterpret_cast<uint32_t*>(out), count, value, reinterpret_cast<void*>(stream));
      },
      "out[i] = value + i for count uint32 at address out, on a stream; returns an error code.");
}
