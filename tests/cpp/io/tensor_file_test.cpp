// format_tensors and parse_tensors: every type, strides, what cannot be written, damaged bytes.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/tensor_file.h>

#include "temporary_folder.h"

namespace {

using rankwise::format_tensors;
using rankwise::parse_tensors;
using rankwise::io::FileError;
using testing::HasSubstr;

const auto numbers = at::arange(6).view({2, 3});

TEST(TensorFile, RoundTripInEveryType) {
  std::map<std::string, at::Tensor> tensors;
  for (const at::ScalarType type :
       {at::kBool, at::kByte, at::kChar, at::kFloat8_e5m2, at::kFloat8_e4m3fn, at::kShort,
        at::kUInt16, at::kHalf, at::kBFloat16, at::kInt, at::kUInt32, at::kFloat, at::kComplexFloat,
        at::kDouble, at::kLong, at::kUInt64})
    tensors[c10::toString(type)] = numbers.to(type);
  tensors["scalar"] = at::scalar_tensor(7.5);
  tensors["empty"] = at::empty({0, 3});
  tensors["strided"] = numbers.t();
  tensors["conjugate"] = at::complex(numbers.to(at::kFloat), numbers.to(at::kFloat)).conj();
  const auto read = parse_tensors(format_tensors(tensors, "state"), "state");
  ASSERT_EQ(read.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(read.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read.at(name).sizes(), tensor.sizes()) << name;
    const auto wide = tensor.is_complex() ? at::kComplexDouble : at::kDouble;
    EXPECT_TRUE(at::equal(read.at(name).to(wide), tensor.to(wide))) << name;
  }
}

TEST(TensorFile, WhatTheFormatDoesNotHaveIsNamed) {
  const auto error = [](const at::Tensor& tensor) {
    return message_of<FileError>([&] { format_tensors({{"x", tensor}}, "state"); });
  };
  EXPECT_THAT(error(at::Tensor()), HasSubstr("state: tensor \"x\" must be defined"));
  EXPECT_THAT(error(numbers.to(at::kComplexDouble)), HasSubstr("got ComplexDouble"));
  EXPECT_THAT(error(numbers.to_sparse()), HasSubstr("must be dense, with data"));
  EXPECT_THAT(error(numbers.to(at::kMeta)), HasSubstr("must be dense, with data"));
}

TEST(TensorFile, WhatTorchDoesNotHaveIsNamed) {
  const std::string header = R"({"t":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})";
  const std::string length = {static_cast<char>(header.size()), 0, 0, 0, 0, 0, 0, 0};
  EXPECT_EQ(message_of<FileError>([&] { parse_tensors(length + header + "x", "state"); }),
            "state: tensor \"t\" must be of a type that torch has, got F4");
}

TEST(TensorFile, EveryTruncationIsAnError) {
  const std::string bytes = format_tensors({{"x", numbers}, {"y", at::ones({3})}}, "state");
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THROW(parse_tensors(bytes.substr(0, size), "state"), FileError) << size;
  }
}

}  // namespace
