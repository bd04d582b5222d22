// What the plugins of this library share: logging, attributes, the guard that keeps exceptions inside, and the methods of
// IPluginV3 that are the same for every operator.
#pragma once

#include "NvInferRuntime.h"
#include "driver.h"

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace dsa
{

constexpr char const* kNamespace = "dsa";
constexpr char const* kVersion = "1";
constexpr char const* kOtherLayout = "the engine was built with another version of this library: build it again";

// To TensorRT's logger; to stderr while the library has none.
void log(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

// A constraint that does not hold; the message names what, and the value found.
struct Unsupported : std::runtime_error
{
    using std::runtime_error::runtime_error;
};

inline void require(bool holds, std::string const& message)
{
    if (!holds)
    {
        throw Unsupported(message);
    }
}

// Runs `body`; an exception is logged as an error of `what`, and `failure` returned.
template <typename Result, typename Body>
Result guarded(char const* what, Result failure, Body&& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        log(nvinfer1::ILogger::Severity::kERROR, std::string("dsa::") + what + ": " + error.what());
    }
    catch (...)
    {
        log(nvinfer1::ILogger::Severity::kERROR, std::string("dsa::") + what + ": unknown exception");
    }
    return failure;
}

// Attributes of a node or of a serialised plugin.
int64_t integerOf(nvinfer1::PluginField const& field);
double numberOf(nvinfer1::PluginField const& field);
// Accepts plugin_version, plugin_namespace and layout if their values are this library's; throws for every other name.
void checkCommonAttribute(nvinfer1::PluginField const& field);
// What a plan keeps beside the attributes: which layout of the workspace it has room for.
nvinfer1::PluginField layoutField();
bool hasLayout(nvinfer1::PluginFieldCollection const& fields);

char const* typeName(nvinfer1::DataType type) noexcept;
bool isHalfOrBfloat(nvinfer1::DataType type) noexcept;
// "fp16" or "bf16", as in the kernels' names.
char const* kernelType(nvinfer1::DataType type);
std::string text(nvinfer1::Dims const& dims);
inline int64_t ceilDiv(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}
// Kernels load 16 bytes at a time.
void requireAligned(void const* pointer, char const* name);

template <typename Operator>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime
{
public:
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(Operator::kName, nullptr, [this] { return new Operator(self()); });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    char const* getPluginName() const noexcept override
    {
        return Operator::kName;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

protected:
    Operator const& self() const
    {
        return static_cast<Operator const&>(*this);
    }
};

// An operator's creator: Operator has kName, static PluginFieldCollection const& attributeFields() and a constructor that
// takes the collection and throws.
template <typename Operator>
class Creator : public nvinfer1::IPluginCreatorV3One
{
public:
    nvinfer1::IPluginV3* createPlugin(char const* layerName, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(Operator::kName, nullptr, [&]() -> nvinfer1::IPluginV3* {
            require(fields != nullptr, "no attributes given");
            try
            {
                require(phase == nvinfer1::TensorRTPhase::kBUILD || hasLayout(*fields), kOtherLayout);
                return new Operator(*fields);
            }
            catch (Unsupported const& error)
            {
                bool const named = layerName != nullptr && *layerName != '\0';
                throw Unsupported((named ? std::string("node ") + layerName + ": " : std::string()) + error.what());
            }
        });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &Operator::attributeFields();
    }

    char const* getPluginName() const noexcept override
    {
        return Operator::kName;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }
};

// Defined by the operators' plugin.cpp, listed in library.cpp.
nvinfer1::IPluginCreatorInterface* indexTopKCreator() noexcept;
nvinfer1::IPluginCreatorInterface* sparseAttentionCreator() noexcept;

} // namespace dsa
