// Python module ramify._cuda: addresses, sizes and a stream in, error codes out. No torch headers, and no CUDA headers either.
#include <pybind11/pybind11.h>

#include <cstdint>

extern "C" {
int ramify_cuda_devices(int* count);
int ramify_cuda_versions(int* driver, int* runtime);
const char* ramify_cuda_message(int error);
int ramify_cuda_run(int64_t kernel, const void* args, void* stream);
int64_t ramify_cuda_size(int64_t kernel);
int64_t ramify_cuda_stats_scratch(int64_t rows, int64_t V, int64_t topk);
int64_t ramify_cuda_attention_scratch(const void* args);
int64_t ramify_cuda_attention_variant(const void* args);
}

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ramify: addresses, sizes and a stream in, a cudaError_t out. Use ramify.ops and ramify.native_cuda instead.";
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
      "run",
      [](int64_t kernel, uintptr_t args, uintptr_t stream) {
        return ramify_cuda_run(kernel, reinterpret_cast<const void*>(args), reinterpret_cast<void*>(stream));
      },
      "Launch a kernel on the struct at address args, on a stream; returns an error code.");
  m.def("size", &ramify_cuda_size, "Bytes of a kernel's argument struct, or -1.");
  m.def("stats_scratch", &ramify_cuda_stats_scratch, "Bytes of scratch that row_stats needs.");
  m.def(
      "attention_scratch", [](uintptr_t args) { return ramify_cuda_attention_scratch(reinterpret_cast<const void*>(args)); },
      "Bytes of scratch that attention needs.");
  m.def(
      "attention_variant", [](uintptr_t args) { return ramify_cuda_attention_variant(reinterpret_cast<const void*>(args)); },
      "Which kernel attention takes: 1 mma.sync, 2 and 3 wgmma with rows as columns and as rows.");
}
