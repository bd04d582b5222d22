// Kernels of the library, launched through the CUDA driver. libcuda.so.1 is opened on first use, so that the library
// also loads on a machine without a driver (to inspect it, to parse a network, to test it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

struct CUstream_st;

namespace dsa
{

// A kernel's machine code for one architecture, or its PTX. The table is generated: see plugins/embed.py.
struct Image
{
    char const* name;
    char const* entry; // of the Triton function
    int arch; // 90 for sm_90
    bool isPtx;
    unsigned char const* data;
    int warps;
    int shared; // bytes
};
extern Image const kImages[];
extern int const kImageCount;

// A kernel that is loaded on the current device. Copies share the loaded code, which lives as long as the process.
class Kernel
{
public:
    Kernel() = default;

    // Loads `name` into the current context: its own machine code, else the nearest older one of the same
    // generation, else PTX. Throws std::runtime_error. Not for use while a stream is captured.
    explicit Kernel(std::string const& name);

    // Throws std::runtime_error. `arguments` point to the values, in the order of the Triton kernel's arguments.
    void launch(unsigned gridX, unsigned gridY, std::initializer_list<void const*> arguments, CUstream_st* stream) const;

private:
    void* mFunction{nullptr};
    Image const* mImage{nullptr};
};

// The image that a device of compute capability `arch` runs, or null.
Image const* findImage(std::string const& name, int arch) noexcept;

} // namespace dsa
