#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace dsa
{
namespace
{

// The part of the driver API that is used, declared here: its C interface is stable, and no CUDA header is needed.
using CUresult = int;
using CUdevice = int;
using CUhandle = void*;

constexpr int kMaxDynamicShared = 8; // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kComputeMajor = 75;    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeMinor = 76;    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: see plugins/dependent.py, whose kernels know it from here on.
constexpr int kProgrammatic = 6;
constexpr int kProgrammaticFrom = 90;

struct LaunchAttribute // CUlaunchAttribute
{
    int id;
    int padding;
    alignas(8) int value[16];
};

struct LaunchConfig // CUlaunchConfig
{
    unsigned grid[3], block[3], shared;
    CUstream_st* stream;
    LaunchAttribute* attributes;
    unsigned count;
};

struct Driver
{
    CUresult (*getErrorString)(CUresult, char const**);
    CUresult (*ctxGetDevice)(CUdevice*);
    CUresult (*deviceGetAttribute)(int*, int, CUdevice);
    CUresult (*libraryLoadData)(CUhandle*, void const*, int*, void**, unsigned, int*, void**, unsigned);
    CUresult (*libraryGetKernel)(CUhandle*, CUhandle, char const*);
    CUresult (*kernelSetAttribute)(int, int, CUhandle, CUdevice);
    CUresult (*kernelGetFunction)(CUhandle*, CUhandle);
    CUresult (*launchKernel)(LaunchConfig const*, CUhandle, void**, void**);

    Driver()
    {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw std::runtime_error("no NVIDIA driver on this machine (libcuda.so.1): kernels cannot run");
        }
        find(library, "cuGetErrorString", getErrorString);
        find(library, "cuCtxGetDevice", ctxGetDevice);
        find(library, "cuDeviceGetAttribute", deviceGetAttribute);
        find(library, "cuLibraryLoadData", libraryLoadData);
        find(library, "cuLibraryGetKernel", libraryGetKernel);
        find(library, "cuKernelSetAttribute", kernelSetAttribute);
        find(library, "cuKernelGetFunction", kernelGetFunction);
        find(library, "cuLaunchKernelEx", launchKernel);
    }

    void check(CUresult result, std::string const& what) const
    {
        if (result != 0)
        {
            char const* text = nullptr;
            getErrorString(result, &text);
            throw std::runtime_error(what + ": " + (text != nullptr ? text : "CUDA error " + std::to_string(result)));
        }
    }

private:
    template <typename Function>
    static void find(void* library, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr)
        {
            throw std::runtime_error(std::string("the NVIDIA driver lacks ") + name + ": CUDA 12.0 or newer is needed");
        }
    }
};

Driver const& driver()
{
    static Driver const instance; // a failed constructor is tried again on the next call
    return instance;
}

} // namespace

Image const* findImage(std::string const& name, int arch) noexcept
{
    Image const* best = nullptr;
    for (int i = 0; i < kImageCount; ++i)
    {
        Image const& image = kImages[i];
        if (name != image.name || image.arch > arch)
        {
            continue;
        }
        bool const runs = image.isPtx || image.arch / 10 == arch / 10; // machine code stays within a generation
        if (runs && (best == nullptr || (best->isPtx && !image.isPtx) || (best->isPtx == image.isPtx && best->arch < image.arch)))
        {
            best = &image;
        }
    }
    return best;
}

Kernel::Kernel(std::string const& name)
{
    struct Prepared
    {
        Image const* image;
        CUhandle kernel; // CUkernel, good for every context of the device
    };
    static std::mutex mutex;
    static std::map<Image const*, CUhandle> loaded; // CUkernel
    static std::map<std::pair<std::string, CUdevice>, Prepared> prepared;

    Driver const& cuda = driver();
    CUdevice device{};
    cuda.check(cuda.ctxGetDevice(&device), "no CUDA context is current");
    std::lock_guard<std::mutex> const lock(mutex);
    auto const key = std::make_pair(name, device);
    auto found = prepared.find(key);
    if (found == prepared.end())
    {
        int major{};
        int minor{};
        cuda.check(cuda.deviceGetAttribute(&major, kComputeMajor, device), "compute capability");
        cuda.check(cuda.deviceGetAttribute(&minor, kComputeMinor, device), "compute capability");
        Image const* image = findImage(name, major * 10 + minor);
        if (image == nullptr)
        {
            throw std::runtime_error("no kernel " + name + " for compute capability " + std::to_string(major) + "."
                + std::to_string(minor) + " (8.0 or newer is needed)");
        }
        CUhandle& kernel = loaded[image];
        if (kernel == nullptr)
        {
            CUhandle library{};
            cuda.check(cuda.libraryLoadData(&library, image->data, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading " + name);
            cuda.check(cuda.libraryGetKernel(&kernel, library, image->entry), "finding " + name);
        }
        cuda.check(cuda.kernelSetAttribute(kMaxDynamicShared, image->shared, kernel, device), "shared memory of " + name);
        found = prepared.emplace(key, Prepared{image, kernel}).first;
    }
    CUhandle function{}; // loads it into the current context now, not at its first launch there
    cuda.check(cuda.kernelGetFunction(&function, found->second.kernel), "preparing " + name);
    mImage = found->second.image;
    mFunction = found->second.kernel;
}

void Kernel::launch(
    unsigned gridX, unsigned gridY, std::initializer_list<void const*> arguments, CUstream_st* stream) const
{
    if (mFunction == nullptr)
    {
        throw std::runtime_error("kernel launched before onShapeChange");
    }
    if (gridX == 0 || gridY == 0)
    {
        return;
    }
    // Triton appends two pointers to scratch memory, which these kernels do not use.
    constexpr std::size_t kMostArguments = 24;
    void* nothing = nullptr;
    void* parameters[kMostArguments + 2];
    std::size_t count = 0;
    for (void const* argument : arguments)
    {
        if (count == kMostArguments)
        {
            throw std::runtime_error("too many kernel arguments");
        }
        parameters[count++] = const_cast<void*>(argument);
    }
    parameters[count++] = &nothing;
    parameters[count++] = &nothing;
    LaunchAttribute programmatic{kProgrammatic, 0, {1}};
    unsigned const threads = static_cast<unsigned>(mImage->warps) * 32;
    bool const waits = !mImage->isPtx && mImage->arch >= kProgrammaticFrom;
    LaunchConfig const config{{gridX, gridY, 1}, {threads, 1, 1}, static_cast<unsigned>(mImage->shared), stream,
        &programmatic, waits ? 1U : 0U};
    Driver const& cuda = driver();
    cuda.check(cuda.launchKernel(&config, mFunction, parameters, nullptr), std::string("launching ") + mImage->name);
}

} // namespace dsa
