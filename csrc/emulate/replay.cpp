// csrc/emulate/replay.cpp: runs recorded kernel calls again, each buffer in a heap block of its exact size, so that a sanitizer
// sees every step outside it, and compares what the call wrote with what it wrote when it was recorded.
//
//     replay FILE...       exit 0: all equal; 1: a difference; 2: a launch failed. pyext/testing/emulator.py writes the files.
//
// A file is int64 words and bytes: kernel, order, seed, late, size of the struct, its bytes, number of buffers; for each buffer its
// offset in the struct, its size, its address modulo 256, its bytes before and its bytes after.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <vector>

extern "C" {
int ramify_cuda_run(int64_t kernel, const void* args, void* stream);
const char* ramify_cuda_message(int error);
void ramify_emulate(int order, uint64_t seed, int late);
}

namespace {

struct Reader {
  FILE* file;
  void bytes(void* to, size_t n) {
    if (n && fread(to, 1, n, file) != n) fprintf(stderr, "replay: the file is cut short\n"), exit(2);
  }
  int64_t word() {
    int64_t x;
    return bytes(&x, sizeof(x)), x;
  }
};

struct Buffer {
  int64_t offset, size;
  char* now;  // aligned as an allocation of the device is
  std::vector<char> after;
};

int replay(const char* path) {
  Reader in = {fopen(path, "rb")};
  if (!in.file) return fprintf(stderr, "replay: %s cannot be read\n", path), 2;
  const int64_t kernel = in.word();
  const int order = int(in.word());
  const uint64_t seed = uint64_t(in.word());
  ramify_emulate(order, seed, int(in.word()));
  std::vector<int64_t> args(size_t(in.word()) / 8);
  in.bytes(args.data(), args.size() * 8);
  std::vector<Buffer> buffers(size_t(in.word()));
  for (Buffer& b : buffers) {
    b.offset = in.word(), b.size = in.word();
    const int64_t aligned = in.word();  // the recorded address modulo 256: it decides how a kernel reads
    b.now = static_cast<char*>(::operator new(size_t(b.size + aligned), std::align_val_t(256))) + aligned;
    b.after.resize(size_t(b.size));
    in.bytes(b.now, size_t(b.size)), in.bytes(b.after.data(), size_t(b.size));
    args[size_t(b.offset) / 8] = reinterpret_cast<int64_t>(b.now);
  }
  fclose(in.file);
  const int error = ramify_cuda_run(kernel, args.data(), nullptr);
  int result = 0;
  if (error) fprintf(stderr, "%s: %s\n", path, ramify_cuda_message(error)), result = 2;
  for (const Buffer& b : buffers) {
    if (!error && memcmp(b.now, b.after.data(), size_t(b.size))) {
      fprintf(stderr, "%s: the buffer at offset %lld differs\n", path, (long long)b.offset), result = 1;
    }
    ::operator delete(b.now - reinterpret_cast<uintptr_t>(b.now) % 256, std::align_val_t(256));
  }
  return result;
}

}  // namespace

int main(int count, char** paths) {
  int worst = 0;
  for (int i = 1; i < count; ++i) {
    const int result = replay(paths[i]);
    worst = result > worst ? result : worst;
  }
  return worst;
}
