// device.cu - devices, the driver, errors of the CUDA runtime.
#include "device.cuh"
#include "launch.cuh"
#include <atomic>
#include <string.h>

namespace wd {

wd_status cuda_failed(cudaError_t error, const char *what) {
  (void)cudaGetLastError(); // clear it: the next call must not report it as its own
  return wd_fail(WD_CUDA_ERROR, "CUDA: %s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

// What is asked on every call, by device; 0 while unknown. Read-only once written, and every writer writes the same.
constexpr int kCachedDevices = 64;
struct Cache {
  std::atomic<int> values[kCachedDevices];
};
static Cache capabilities, multiprocessor_counts, shared_memory_sizes, l2_sizes;

template <class Ask> static wd_status cached(Cache &cache, int device, int *value, Ask ask) {
  const bool fits = device >= 0 && device < kCachedDevices;
  *value = fits ? cache.values[device].load(std::memory_order_relaxed) : 0;
  if (*value != 0) return WD_OK;
  WD_TRY(ask());
  if (fits) cache.values[device].store(*value, std::memory_order_relaxed);
  return WD_OK;
}

static wd_status compute_capability(int device, int *capability) {
  return cached(capabilities, device, capability, [&]() -> wd_status {
    int major = 0, minor = 0;
    WD_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    WD_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    *capability = 10 * major + minor;
    return WD_OK;
  });
}

wd_status serves_dependent_launch(bool *serves) {
  int device = 0, capability = 0;
  WD_CUDA(cudaGetDevice(&device));
  WD_TRY(compute_capability(device, &capability));
  *serves = capability >= 90;
  return WD_OK;
}

wd_status multiprocessors(int *count) {
  int device = 0;
  WD_CUDA(cudaGetDevice(&device));
  return cached(multiprocessor_counts, device, count, [&]() -> wd_status {
    WD_CUDA(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
    return WD_OK;
  });
}

static wd_status shared_memory_on(int device, int *bytes) {
  return cached(shared_memory_sizes, device, bytes, [&]() -> wd_status {
    WD_CUDA(cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return WD_OK;
  });
}

wd_status find_kept(wd_moe_shape *shape) {
  int device = 0, l2 = 0;
  WD_CUDA(cudaGetDevice(&device));
  WD_TRY(cached(l2_sizes, device, &l2, [&]() -> wd_status {
    WD_CUDA(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
    return WD_OK;
  }));
  shape->kept = shape->tokens * shape->top_k * 4 * ((int64_t)shape->intermediate + shape->hidden) <= l2 / 2;
  return WD_OK;
}

wd_status shared_memory_of_block(int *bytes) {
  int device = 0;
  WD_CUDA(cudaGetDevice(&device));
  return shared_memory_on(device, bytes);
}

wd_status allow_shared_memory(const void *kernel, std::atomic<uint64_t> *devices) {
  int device = 0, bytes = 0;
  WD_CUDA(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0; // beyond: asked every time
  if (devices->load(std::memory_order_relaxed) & bit) return WD_OK;
  WD_TRY(shared_memory_of_block(&bytes));
  cudaFuncAttributes attributes;
  WD_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  WD_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               bytes - (int)attributes.sharedSizeBytes));
  WD_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  devices->fetch_or(bit, std::memory_order_relaxed);
  return WD_OK;
}

// The sentence for a machine on which CUDA cannot be used at all.
static wd_status no_cuda(cudaError_t error) {
  (void)cudaGetLastError();
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  if (driver == 0)
    return wd_fail(WD_NO_CUDA,
                   "CUDA: no driver found on this machine; install NVIDIA's driver (for CUDA %d.%d or "
                   "newer), or use tensors on the CPU",
                   CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  if (error == cudaErrorInsufficientDriver)
    return wd_fail(WD_NO_CUDA,
                   "CUDA: the driver serves CUDA %d.%d, expected %d.0 or newer (this build uses the runtime "
                   "%d.%d); update NVIDIA's driver, or build warpdecode with an older CUDA Toolkit",
                   driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION / 1000,
                   CUDART_VERSION % 1000 / 10);
  return wd_fail(WD_NO_CUDA, "CUDA: %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
}

} // namespace wd

wd_status wd_cuda_enter(int32_t device, int32_t *previous) {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return wd::no_cuda(error);
  *previous = current;
  if (device != current) WD_CUDA(cudaSetDevice(device));
  int capability = 0;
  wd_status status = wd::compute_capability(device, &capability);
  if (status == WD_OK && capability < 80)
    status = wd_fail(WD_UNSUPPORTED, "device: compute capability was %d.%d, expected 8.0 or newer", capability / 10,
                     capability % 10);
  if (status != WD_OK) (void)wd_cuda_leave(current); // the first failure is the one to report
  return status;
}

wd_status wd_cuda_leave(int32_t previous) {
  int current = 0;
  WD_CUDA(cudaGetDevice(&current));
  if (current != previous) WD_CUDA(cudaSetDevice(previous));
  return WD_OK;
}

wd_status wd_cuda_device_count(int32_t *count) {
  WD_CHECK(count != NULL, WD_INVALID_ARGUMENT, "count: was NULL, expected a place for the number of devices");
  *count = 0;
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return wd::no_cuda(error);
  *count = devices;
  return WD_OK;
}

wd_status wd_get_cuda_device_info(int32_t device, wd_cuda_device_info *info) {
  WD_CHECK(info != NULL, WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_cuda_device_info");
  WD_TRY(wd_check_struct_size(info->struct_size, sizeof *info, "info"));
  int32_t count = 0;
  WD_TRY(wd_cuda_device_count(&count));
  WD_CHECK(device >= 0 && device < count, WD_INVALID_ARGUMENT, "device: was %d, expected 0 to %d", device, count - 1);
  cudaDeviceProp properties;
  WD_CUDA(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  WD_CUDA(cudaDriverGetVersion(&driver));
  memcpy(info->name, properties.name, sizeof info->name);
  info->compute_capability = 10 * properties.major + properties.minor;
  info->num_sms = properties.multiProcessorCount;
  info->driver_version = driver;
  info->l2_bytes = properties.l2CacheSize;
  info->memory_bytes = (int64_t)properties.totalGlobalMem;
  return WD_OK;
}

static int schedule_runs(wd_cuda_schedule schedule, int device) {
#ifdef WD_CUDA_TILED_BUILT
  constexpr bool built = true;
#else
  constexpr bool built = false;
#endif
  int capability = 0;
  return schedule != WD_CUDA_TILED ||
         (built && wd::compute_capability(device, &capability) == WD_OK && capability == 90);
}

int wd_cuda_serves(wd_cuda_schedule schedule, int32_t device, const wd_moe_shape *shape) {
  if (schedule == WD_CUDA_DIRECT) {
    int limit = 0;
    if (shape->top_k > WD_CUDA_DIRECT_MAX_TOP_K || shape->hidden > WD_CUDA_DIRECT_MAX_ROWS ||
        shape->intermediate > WD_CUDA_DIRECT_MAX_ROWS || wd::shared_memory_on(device, &limit) != WD_OK ||
        (int)wd::direct_shared_bytes(shape->top_k, WD_CUDA_DIRECT_RING) > limit)
      return 0;
  }
  const int64_t rows =
      2 * (int64_t)shape->intermediate > shape->hidden ? 2 * (int64_t)shape->intermediate : shape->hidden;
  if (schedule == WD_CUDA_TILED && (shape->scattered || shape->transposed ||
                                    shape->experts > WD_CUDA_TILED_MAX_EXPERTS || shape->experts * rows > INT32_MAX))
    return 0; // the tensor memory accelerator counts rows in 32 bits
  return schedule_runs(schedule, device);
}

int wd_cuda_usable(wd_cuda_schedule schedule) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  for (int device = 0; device < devices; device++)
    if (schedule_runs(schedule, device)) return 1;
  return 0;
}

int32_t wd_cuda_runtime_version(void) {
  return CUDART_VERSION;
}

const char *wd_cuda_architectures(void) {
  return WD_CUDA_ARCHITECTURES;
}
