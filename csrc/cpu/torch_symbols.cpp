#include "kvkernels/torch_symbols.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace kvkernels {
namespace {

int note_torch_library(dl_phdr_info* info, size_t, void* result) {
  if (info->dlpi_name == nullptr || !std::strstr(info->dlpi_name, "libtorch_cpu.")) return 0;
  *static_cast<std::string*>(result) = info->dlpi_name;
  return 1;
}

}  // namespace

void* find_torch_symbol(const char* name) {
  std::string path;
  dl_iterate_phdr(note_torch_library, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace kvkernels
