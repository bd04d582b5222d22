// The library's two exports, and what plugin.h declares.
#include "constants.h"
#include "plugin.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

namespace dsa
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};
constexpr char const* kLayoutName = "layout";
constexpr int64_t kLayout = LAYOUT;

} // namespace

void log(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept
{
    try
    {
        if (nvinfer1::ILoggerFinder* finder = gLoggerFinder.load())
        {
            if (nvinfer1::ILogger* logger = finder->findLogger())
            {
                logger->log(severity, message.c_str());
                return;
            }
        }
    }
    catch (...)
    {
        // A logger that throws must not take the engine with it; the message goes to stderr.
    }
    std::fprintf(stderr, "%s\n", message.c_str());
}

int64_t integerOf(nvinfer1::PluginField const& field)
{
    require(field.data != nullptr && field.length == 1, std::string("attribute ") + field.name + " must be one integer");
    switch (field.type)
    {
    case nvinfer1::PluginFieldType::kINT32: return *static_cast<int32_t const*>(field.data);
    case nvinfer1::PluginFieldType::kINT64: return *static_cast<int64_t const*>(field.data);
    default: throw Unsupported(std::string("attribute ") + field.name + " must be an integer");
    }
}

double numberOf(nvinfer1::PluginField const& field)
{
    require(field.data != nullptr && field.length == 1, std::string("attribute ") + field.name + " must be one number");
    switch (field.type)
    {
    case nvinfer1::PluginFieldType::kFLOAT32: return *static_cast<float const*>(field.data);
    case nvinfer1::PluginFieldType::kFLOAT64: return *static_cast<double const*>(field.data);
    default: throw Unsupported(std::string("attribute ") + field.name + " must be a floating-point number");
    }
}

void checkCommonAttribute(nvinfer1::PluginField const& field)
{
    std::string const name = field.name != nullptr ? field.name : "";
    if (name == kLayoutName)
    {
        require(integerOf(field) == kLayout, kOtherLayout);
        return;
    }
    bool const isVersion = name == "plugin_version";
    require(isVersion || name == "plugin_namespace", "unknown attribute " + name);
    require(field.type == nvinfer1::PluginFieldType::kCHAR && field.data != nullptr && field.length >= 0,
        "attribute " + name + " must be a string");
    std::string value(static_cast<char const*>(field.data), static_cast<std::size_t>(field.length));
    value = value.c_str(); // some callers count the closing zero
    char const* expected = isVersion ? kVersion : kNamespace;
    require(value == expected, "attribute " + name + " must be \"" + expected + "\", got \"" + value + "\"");
}

nvinfer1::PluginField layoutField()
{
    return {kLayoutName, &kLayout, nvinfer1::PluginFieldType::kINT64, 1};
}

bool hasLayout(nvinfer1::PluginFieldCollection const& fields)
{
    return std::any_of(fields.fields, fields.fields + fields.nbFields,
        [](nvinfer1::PluginField const& field) { return field.name != nullptr && std::strcmp(field.name, kLayoutName) == 0; });
}

char const* typeName(nvinfer1::DataType type) noexcept
{
    switch (type)
    {
    case nvinfer1::DataType::kFLOAT: return "fp32";
    case nvinfer1::DataType::kHALF: return "fp16";
    case nvinfer1::DataType::kBF16: return "bf16";
    case nvinfer1::DataType::kINT32: return "int32";
    case nvinfer1::DataType::kINT64: return "int64";
    case nvinfer1::DataType::kFP8: return "fp8";
    case nvinfer1::DataType::kINT8: return "int8";
    default: return "another type";
    }
}

bool isHalfOrBfloat(nvinfer1::DataType type) noexcept
{
    return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

char const* kernelType(nvinfer1::DataType type)
{
    require(isHalfOrBfloat(type), std::string("tensors must be fp16 or bf16, got ") + typeName(type));
    return typeName(type);
}

std::string text(nvinfer1::Dims const& dims)
{
    std::string result = "[";
    for (int i = 0; i < dims.nbDims; ++i)
    {
        result += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return result + "]";
}

void requireAligned(void const* pointer, char const* name)
{
    require(pointer != nullptr, std::string(name) + " has no address");
    require(reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0, std::string(name) + " must be aligned to 16 bytes");
}

} // namespace dsa

#define DSA_EXPORT extern "C" __attribute__((visibility("default")))

DSA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static nvinfer1::IPluginCreatorInterface* const creators[] = {dsa::indexTopKCreator(), dsa::sparseAttentionCreator()};
    count = 2;
    return creators;
}

DSA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    dsa::gLoggerFinder = finder;
}
