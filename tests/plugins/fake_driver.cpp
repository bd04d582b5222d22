// A CUDA driver that runs nothing: memory is the host's, and every launch is written to standard output as
//
//   <kernel> <grid x> <grid y> <threads> <shared bytes> <attribute> <arguments...>
//
// attribute: the id of the launch attribute, 0 if there is none.
// Pointers print as p<address>, 32-bit values as integers (of a float: its bits). FAKE_DRIVER_SIGNATURES names a file with
// "<kernel> <letters>" lines: p for a pointer, i for 32 bits. FAKE_DRIVER_ARCH is the compute capability (default 90).
// There are FAKE_DRIVER_DEVICES (default 1), and every stream that is made goes to the next of them. FAKE_DRIVER_IMAGES
// names a file for a line per loaded image: the two bytes of machine code's flags that may hold its architecture, of PTX
// "0 0".
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace
{

std::mutex gMutex;
using Entry = std::pair<void const*, std::string>; // a loaded image and the name of its kernel: images share names
std::set<Entry> gEntries;                          // that were asked for; a handle is the address
std::map<std::pair<Entry const*, int>, int> gShared; // allowed to a kernel on a device
std::map<void*, int> gStreams; // their devices
int gDevice = 0; // the current one
bool gUploading = false; // on the null stream, which the streams of launches do not wait for

int number(char const* name, int otherwise)
{
    char const* given = std::getenv(name);
    return given != nullptr ? std::atoi(given) : otherwise;
}

int arch() { return number("FAKE_DRIVER_ARCH", 90); }

std::string signature(std::string const& kernel)
{
    std::ifstream file(std::getenv("FAKE_DRIVER_SIGNATURES"));
    std::string name, letters;
    while (file >> name >> letters)
    {
        if (name == kernel)
        {
            return letters;
        }
    }
    return "";
}

} // namespace

extern "C"
{

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &gMutex; return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { *device = gDevice; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? arch() / 10 : arch() % 10; return 0; }
int cuGetErrorString(int, char const** text) { *text = "fake error"; return 0; }
int cuStreamCreate(void** stream, unsigned)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    *stream = std::malloc(1);
    gDevice = static_cast<int>(gStreams.size()) % number("FAKE_DRIVER_DEVICES", 1);
    gStreams[*stream] = gDevice;
    return 0;
}
int cuStreamSynchronize(void*) { return 0; }
int cuCtxSynchronize() { gUploading = false; return 0; }
int cuMemAlloc_v2(unsigned long long* address, std::size_t bytes)
{
    *address = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    return 0;
}
int cuMemsetD8_v2(unsigned long long address, unsigned char value, std::size_t bytes)
{
    std::memset(reinterpret_cast<void*>(address), value, bytes);
    gUploading = true;
    return 0;
}
int cuMemsetD8Async(unsigned long long address, unsigned char value, std::size_t bytes, void*)
{
    std::memset(reinterpret_cast<void*>(address), value, bytes);
    return 0;
}
int cuMemcpyHtoD_v2(unsigned long long address, void const* data, std::size_t bytes)
{
    std::memcpy(reinterpret_cast<void*>(address), data, bytes);
    gUploading = true;
    return 0;
}
int cuMemcpyDtoH_v2(void* data, unsigned long long address, std::size_t bytes)
{
    std::memcpy(data, reinterpret_cast<void*>(address), bytes);
    return 0;
}

// Machine code is an ELF file, PTX a string that begins with a comment.
int cuLibraryLoadData(void** library, void const* data, int*, void**, unsigned, int*, void**, unsigned)
{
    bool const isElf = std::memcmp(data, "\177ELF", 4) == 0;
    if (char const* file = std::getenv("FAKE_DRIVER_IMAGES"))
    {
        auto const* bytes = static_cast<unsigned char const*>(data);
        std::ofstream(file, std::ios::app) << (isElf ? bytes[48] : 0) << " " << (isElf ? bytes[49] : 0) << "\n";
    }
    *library = const_cast<void*>(data);
    return isElf || std::memcmp(data, "//", 2) == 0 ? 0 : 200;
}
int cuLibraryGetKernel(void** kernel, void* library, char const* name)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    if (std::memcmp(library, "//", 2) == 0 && std::strstr(static_cast<char const*>(library), name) == nullptr)
    {
        return 500;
    }
    *kernel = const_cast<Entry*>(&*gEntries.emplace(library, name).first);
    return 0;
}
int cuKernelSetAttribute(int, int value, void* kernel, int device)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    gShared[{static_cast<Entry const*>(kernel), device}] = value;
    return value > 99 * 1024 && arch() % 10 != 0 ? 1 : 0; // sm_86 and sm_89 allow 99 KB
}
int cuKernelGetFunction(void** function, void* kernel) { *function = kernel; return 0; }

struct Config // CUlaunchConfig, whose attributes begin with their id
{
    unsigned x, y, z, threads, threadsY, threadsZ, shared;
    void* stream;
    int const* attributes;
    unsigned count;
};

int cuLaunchKernelEx(Config const* config, void* function, void** parameters, void**)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    auto const* entry = static_cast<Entry const*>(function);
    std::string const& name = entry->second;
    auto const [x, y, threads, shared] = std::array<unsigned, 4>{config->x, config->y, config->threads, config->shared};
    std::string const letters = signature(name);
    int const allowed = gShared[{entry, gStreams[config->stream]}];
    if (gUploading || x == 0 || y == 0 || y > 65535 || letters.empty() || static_cast<int>(shared) > allowed)
    {
        return 1;
    }
    std::printf("%s %u %u %u %u %d", name.c_str(), x, y, threads, shared, config->count > 0 ? *config->attributes : 0);
    std::size_t i = 0;
    for (; i < letters.size(); ++i)
    {
        if (letters[i] == 'p')
        {
            std::printf(" p%llu", *static_cast<unsigned long long*>(parameters[i]));
        }
        else
        {
            std::printf(" %d", *static_cast<int32_t*>(parameters[i]));
        }
    }
    // Triton's two scratch pointers.
    bool const scratch = *static_cast<void**>(parameters[i]) == nullptr && *static_cast<void**>(parameters[i + 1]) == nullptr;
    std::printf("\n");
    std::fflush(stdout);
    return scratch ? 0 : 1;
}

} // extern "C"
