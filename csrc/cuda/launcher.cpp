// The driver API, opened at run time: module loading, launches, tensor maps.
#include "cuda/launcher.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace magi::cuda {
namespace {

// The few driver declarations used, as cuda.h has them.
using Result = int;
using Handle = void*;
constexpr int kComputeMajor = 75, kComputeMinor = 76, kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct LaunchAttribute {  // CUlaunchAttribute
    int id;
    alignas(8) int value[16];
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, smem;
    Handle stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
constexpr int kProgrammaticSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct Driver {
    Result (*error_string)(Result, const char**);
    Result (*init)(unsigned);
    Result (*context_current)(Handle*);
    Result (*context_set)(Handle);
    Result (*primary_retain)(Handle*, int);
    Result (*device_attribute)(int*, int, int);
    Result (*library_load)(Handle*, const void*, void*, void**, unsigned, void*, void**, unsigned);
    Result (*library_kernel)(Handle*, Handle, const char*);
    Result (*kernel_set)(int, int, Handle, int);
    Result (*launch)(const LaunchConfig*, Handle, void**, void**);
    Result (*memset8)(unsigned long long, unsigned char, size_t, Handle);
    Result (*encode_tiled)(TensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                           const uint32_t*, int, int, int, int);
};

template <class F>
void load(void* library, const char* name, F& f) {
    f = reinterpret_cast<F>(dlsym(library, name));
    if (!f)
        throw std::runtime_error(std::string("magi_attention: the NVIDIA driver has no ") + name +
                                 "; version 525 or newer is needed");
}

const Driver& driver() {
    static const Driver d = [] {
        void* lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!lib)
            throw std::runtime_error(std::string("magi_attention: the NVIDIA driver cannot be opened: ") + dlerror());
        Driver d;
        load(lib, "cuGetErrorString", d.error_string);
        load(lib, "cuInit", d.init);
        load(lib, "cuCtxGetCurrent", d.context_current);
        load(lib, "cuCtxSetCurrent", d.context_set);
        load(lib, "cuDevicePrimaryCtxRetain", d.primary_retain);
        load(lib, "cuDeviceGetAttribute", d.device_attribute);
        load(lib, "cuLibraryLoadData", d.library_load);
        load(lib, "cuLibraryGetKernel", d.library_kernel);
        load(lib, "cuKernelSetAttribute", d.kernel_set);
        load(lib, "cuLaunchKernelEx", d.launch);
        load(lib, "cuMemsetD8Async", d.memset8);
        load(lib, "cuTensorMapEncodeTiled", d.encode_tiled);
        d.init(0);
        return d;
    }();
    return d;
}

void check(Result result, const char* call) {
    if (result == 0) return;
    const char* text = nullptr;
    driver().error_string(result, &text);
    throw std::runtime_error(std::string("magi_attention: ") + call +
                             " failed: " + (text ? text : std::to_string(result)));
}

int attribute(int what, int device) {
    int value = 0;
    check(driver().device_attribute(&value, what, device), "cuDeviceGetAttribute");
    return value;
}

// A thread that has not touched CUDA yet has no context: give it torch's.
void ensure_context(int device) {
    Handle context = nullptr;
    check(driver().context_current(&context), "cuCtxGetCurrent");
    if (context) return;
    check(driver().primary_retain(&context, device), "cuDevicePrimaryCtxRetain");
    check(driver().context_set(context), "cuCtxSetCurrent");
}

struct Registry {
    std::mutex mutex;
    std::map<std::string, std::string> cubins;  // bytes by variant
    std::map<std::string, Handle> libraries;
    std::map<std::tuple<std::string, std::string, int>, Handle> kernels;  // by variant, entry and device
    void (*on_missing)(const char*) = nullptr;
};
Registry& registry() {
    static Registry* r = new Registry;  // never destroyed: kernels may be launched from atexit handlers
    return *r;
}

}  // namespace

void* current_stream(int device) {
    using Get = int (*)(int, void**);
    static const Get get = [] {
        void* lib = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        if (!lib)
            throw std::runtime_error(
                "magi_attention: libtorch_cuda.so is not loaded; CUDA tensors need a CUDA build of torch");
        Get f;
        load(lib, "aoti_torch_get_current_cuda_stream", f);
        return f;
    }();
    void* stream = nullptr;
    if (get(device, &stream) != 0)
        throw std::runtime_error("magi_attention: torch has no current stream for this device");
    return stream;
}

int num_sms(int device) {
    static std::mutex mutex;
    static std::map<int, int> known;
    const std::lock_guard lock(mutex);
    auto [at, fresh] = known.try_emplace(device, 0);
    if (fresh) at->second = attribute(kMultiprocessors, device);
    return at->second;
}

void check_hopper(int device) {
    static std::mutex mutex;
    static std::map<int, bool> known;
    const std::lock_guard lock(mutex);
    if (known.count(device)) return;
    const int major = attribute(kComputeMajor, device), minor = attribute(kComputeMinor, device);
    if (major != 9 || minor != 0)
        throw std::runtime_error(
            "magi_attention: the CUDA kernels need a Hopper GPU (compute capability 9.0), device " +
            std::to_string(device) + " has " + std::to_string(major) + "." + std::to_string(minor) +
            "; move the tensors to the CPU, or use magi_attention.reference for debugging");
    known[device] = true;
}

void* kernel(const std::string& variant, const char* entry, int device, unsigned smem) {
    Registry& r = registry();
    ensure_context(device);
    std::unique_lock lock(r.mutex);
    if (auto at = r.kernels.find({variant, entry, device}); at != r.kernels.end()) return at->second;
    if (!r.cubins.count(variant) && r.on_missing) {
        lock.unlock();  // the hook registers the cubin
        check_hopper(device);
        r.on_missing(variant.c_str());
        lock.lock();
    }
    const auto cubin = r.cubins.find(variant);
    if (cubin == r.cubins.end())
        throw std::runtime_error("magi_attention: kernel " + variant +
                                 " is not compiled; run `python -m magi_attention.jit build`");
    Handle& library = r.libraries[variant];
    if (!library)
        check(driver().library_load(&library, cubin->second.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
              "cuLibraryLoadData");
    Handle kernel = nullptr;
    check(driver().library_kernel(&kernel, library, entry), "cuLibraryGetKernel");
    if (smem > 48 * 1024)
        check(driver().kernel_set(kMaxDynamicShared, (int)smem, kernel, device), "cuKernelSetAttribute");
    return r.kernels[{variant, entry, device}] = kernel;
}

void launch_raw(void* kernel, Grid grid, unsigned threads, unsigned smem, void* stream, const void* args,
                bool overlap) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    void* params[] = {const_cast<void*>(args)};
    LaunchAttribute early{kProgrammaticSerialization, {1}};
    const LaunchConfig config{grid.x, grid.y, grid.z, threads, 1, 1, smem, stream, &early, overlap ? 1u : 0u};
    check(driver().launch(&config, kernel, params, nullptr), "cuLaunchKernelEx");
}

void zero(void* data, size_t bytes, void* stream) {
    check(driver().memset8(reinterpret_cast<unsigned long long>(data), 0, bytes, stream), "cuMemsetD8Async");
}

bool can_map(const Heads& t) {
    const auto aligned = [](int64_t elements) {
        return elements > 0 && elements % 8 == 0 && elements < (int64_t(1) << 39);
    };
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && aligned(t.row_stride) && aligned(t.head_stride);
}

TensorMap heads_map(Dtype dtype, const Heads& t, int num_rows, int num_heads, int dim, int box_rows) {
    constexpr int kFloat16 = 6, kBfloat16 = 9, kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3,
                  kZeroFill = 0;  // CU_TENSOR_MAP_*
    TensorMap map;
    const uint64_t dims[] = {(uint64_t)dim, (uint64_t)num_heads, (uint64_t)num_rows};
    const uint64_t strides[] = {2 * (uint64_t)t.head_stride, 2 * (uint64_t)t.row_stride};
    const uint32_t box[] = {64, 1, (uint32_t)box_rows}, steps[] = {1, 1, 1};
    check(driver().encode_tiled(&map, dtype == Dtype::kBF16 ? kBfloat16 : kFloat16, 3, t.data, dims, strides, box,
                                steps, kNoInterleave, kSwizzle128, kPromote256, kZeroFill),
          "cuTensorMapEncodeTiled");
    return map;
}

TileTable build_tiles(void* workspace, const Slice* slices, int num_slices, int num_q, int num_k, int tile_rows,
                      int step, bool transposed, int device, void* stream, bool cut) {
    const TileTable table = table_over(workspace, transposed ? num_k : num_q, tile_rows, step, num_slices, cut);
    const TilesArgs args{table, slices, num_slices, num_q, num_k, transposed};
    if (small_table(table.num_tiles, num_slices)) {
        launch(kernel("tiles", "tiles_small", device, 0), {1}, kSmallThreads, 0, stream, args, /*overlap=*/true);
    } else {
        zero(table.header, sizeof(TileHeader), stream);
        launch(kernel("tiles", "tiles", device, 0), {(unsigned)table.num_tiles}, 256, 0, stream, args);
    }
    return table;
}

}  // namespace magi::cuda

// The door for jit.py (ctypes): compiled code comes in by name, and a hook is called for a name that is missing.
extern "C" __attribute__((visibility("default"))) void magi_cuda_add_cubin(const char* variant, const void* bytes,
                                                                           size_t size) {
    auto& r = magi::cuda::registry();
    const std::lock_guard lock(r.mutex);
    r.cubins.try_emplace(variant, static_cast<const char*>(bytes), size);
}
extern "C" __attribute__((visibility("default"))) void magi_cuda_on_missing(void (*hook)(const char*)) {
    auto& r = magi::cuda::registry();
    const std::lock_guard lock(r.mutex);
    r.on_missing = hook;
}
