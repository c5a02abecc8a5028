// The safetensors header: what is read, what is refused, what is written.
#include "io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>

#include <bit>

#include "temporary_folder.h"

namespace {

using namespace rankwise::io;
using testing::ElementsAre;
using testing::HasSubstr;

/// A file with this header, padded with `data_size` zero bytes.
std::string file_of(const std::string& json, size_t data_size) {
  const uint64_t length = json.size();
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
  return file + json + std::string(data_size, '\0');
}

Header parse(const std::string& file) {
  return parse_header(std::as_bytes(std::span(file)), file.size(), "F");
}

std::string error_of(const std::string& file) {
  return message_of<FileError>([&] { parse(file); });
}

/// The error of a header whose one tensor "t" is this JSON.
std::string tensor_error(const std::string& tensor, size_t data_size = 8) {
  return error_of(file_of("{\"t\": " + tensor + "}", data_size));
}

const std::string small_file = file_of(
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}   )",
    14);

TEST(Safetensors, ReadsAHeader) {
  const Header header = parse(small_file);
  EXPECT_EQ(header.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_EQ(header.data_start, small_file.size() - 14);
  ASSERT_EQ(header.tensors.size(), 2u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[0].dtype, DType::f32);
  EXPECT_THAT(header.tensors[0].shape, ElementsAre(2, 1));
  EXPECT_EQ(header.tensors[1].begin, 8u);
  EXPECT_EQ(header.tensors[1].end, 14u);
}

TEST(Safetensors, ReadsEmptyScalarAndUnorderedTensors) {
  EXPECT_TRUE(parse(file_of("{}", 0)).tensors.empty());
  const Header header =
      parse(file_of(R"({"z":{"data_offsets":[4,4],"shape":[0,1000],"dtype":"F64"},)"
                    R"("b":{"dtype":"F32","shape":[],"data_offsets":[4,8]},)"
                    R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                    8));
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[1].name, "z");
  EXPECT_EQ(header.tensors[2].name, "b");
}

TEST(Safetensors, EveryTypeHasANameAndSize) {
  for (int i = 0; i <= static_cast<int>(DType::u64); ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
  }
  EXPECT_EQ(parse(file_of(R"({"t":{"dtype":"F4","shape":[3,2],"data_offsets":[0,3]}})", 3))
                .tensors[0]
                .dtype,
            DType::f4);
  EXPECT_THAT(tensor_error(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})", 1),
              HasSubstr("whole number of bytes"));
  EXPECT_THAT(tensor_error(R"({"dtype":"C64","shape":[1],"data_offsets":[0,4]})"),
              HasSubstr("must span 8 bytes, got [0, 4]"));
}

TEST(Safetensors, EveryTruncationIsAnError) {
  for (size_t size = 0; size < small_file.size(); ++size) {
    EXPECT_THROW(parse(small_file.substr(0, size)), FileError) << size;
  }
}

TEST(Safetensors, TrailingBytesAreAnError) {
  EXPECT_EQ(error_of(small_file + "x"), "F: the tensors must cover all 15 data bytes, got 14");
}

TEST(Safetensors, EveryBitFlipIsAnErrorOrWellFormed) {
  for (size_t bit = 0; bit < 8 * small_file.size(); ++bit) {
    std::string file = small_file;
    file[bit / 8] = static_cast<char>(file[bit / 8] ^ (1 << (bit % 8)));
    try {
      uint64_t position = 0;
      for (const TensorInfo& tensor : parse(file).tensors) {
        EXPECT_EQ(tensor.begin, position) << bit;
        position = tensor.end;
      }
      EXPECT_EQ(position, 14u) << bit;
    } catch (const FileError&) {
    }
  }
}

TEST(Safetensors, HeaderLengthIsChecked) {
  EXPECT_EQ(error_of("1234567"), "F: must hold at least 8 bytes, got 7");
  for (const uint64_t length :
       {uint64_t{3}, uint64_t{100'000'001}, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::string file = file_of("{}", 0);
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
    EXPECT_EQ(error_of(file), "F: header length must be at most 2, got " + std::to_string(length));
  }
  const std::string head = file_of("", 0).replace(0, 8, "\x01\xE1\xF5\x05\0\0\0\0", 8);
  EXPECT_THAT(message_of<FileError>(
                  [&] { parse_header(std::as_bytes(std::span(head)), uint64_t{1} << 40, "F"); }),
              HasSubstr("at most 100000000, got 100000001"));
  const std::string cut = file_of("{}", 0).substr(0, 9);
  EXPECT_EQ(message_of<FileError>([&] { parse_header(std::as_bytes(std::span(cut)), 10, "F"); }),
            "F: header must be 2 bytes, got 1");
}

TEST(Safetensors, HeaderMustBeOneJsonObject) {
  EXPECT_EQ(error_of(file_of("", 0)), "F: the header must start with '{'");
  EXPECT_EQ(error_of(file_of(" {}", 0)), "F: the header must start with '{'");
  EXPECT_EQ(error_of(file_of("[]", 0)), "F: the header must start with '{'");
  EXPECT_EQ(error_of(file_of("{} {}", 0)), "F: the header is not valid JSON at byte 4");
  EXPECT_THAT(error_of(file_of("{\"\xFF\": 1}", 0)), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_of(file_of("{\"t\": 1e999}", 0)), HasSubstr("not valid JSON"));
}

TEST(Safetensors, NestingEndsAtOnce) {
  const std::string deep(1'000'000, '[');
  EXPECT_EQ(error_of(file_of("{\"t\": " + deep, 0)),
            "F: tensor \"t\": must be an object, got an array");
  EXPECT_THAT(
      tensor_error(R"({"shape": [[1]]})"),
      HasSubstr("shape must be an array of at most 64 integers in 0 .. 2^63 - 1, got an array"));
  EXPECT_THAT(error_of(file_of(R"({"__metadata__": {"a": {"b": 1}}})", 0)),
              HasSubstr("\"a\" must be a string, got an object"));
}

TEST(Safetensors, DuplicatesAreErrors) {
  const std::string tensor = R"({"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  EXPECT_EQ(
      error_of(file_of("{\"t\":" + tensor + ",\"u\":" + tensor + ",\"t\":" + tensor + "}", 0)),
      "F: tensor \"t\" is given twice");
  EXPECT_EQ(tensor_error(R"({"dtype":"F32","dtype":"F32"})"),
            "F: tensor \"t\": \"dtype\" is given twice");
  EXPECT_EQ(error_of(file_of(R"({"__metadata__":{"a":"1","a":"2"}})", 0)),
            "F: __metadata__ key \"a\" is given twice");
  EXPECT_EQ(error_of(file_of(R"({"__metadata__":{},"__metadata__":{}})", 0)),
            "F: __metadata__ is given twice");
}

TEST(Safetensors, MembersAndTypesAreChecked) {
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","shape":[2]})"),
              HasSubstr("must have dtype, shape and data_offsets"));
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","x":1})"),
              HasSubstr("must have only dtype, shape and data_offsets, got \"x\""));
  EXPECT_THAT(tensor_error(R"({"dtype":"F31"})"),
              HasSubstr("dtype must be a safetensors type, got \"F31\""));
  EXPECT_THAT(tensor_error(R"({"dtype":null})"), HasSubstr("dtype must be a string, got null"));
  EXPECT_THAT(tensor_error(R"({"dtype":true})"),
              HasSubstr("dtype must be a string, got a boolean"));
  EXPECT_THAT(tensor_error("7"), HasSubstr("must be an object, got 7"));
  EXPECT_THAT(tensor_error("\"x\""), HasSubstr("must be an object, got \"x\""));
  EXPECT_THAT(tensor_error(R"({"shape":[-1]})"), HasSubstr("got -1"));
  EXPECT_THAT(tensor_error(R"({"shape":[1.5]})"), HasSubstr("got 1.5"));
  EXPECT_THAT(tensor_error(R"({"shape":[9223372036854775808]})"),
              HasSubstr("got 9223372036854775808"));
  EXPECT_THAT(tensor_error(R"({"shape":[99999999999999999999]})"),
              HasSubstr("got 99999999999999999999"));
  EXPECT_THAT(tensor_error(R"({"shape":3})"), HasSubstr("shape must be an array"));
  EXPECT_THAT(
      tensor_error(R"({"data_offsets":[0]})"),
      HasSubstr("data_offsets must be two integers in 0 .. 2^63 - 1, got the end of the array"));
  EXPECT_THAT(tensor_error(R"({"data_offsets":[0,1,2]})"), HasSubstr("got 2"));
  EXPECT_THAT(error_of(file_of(R"({"__metadata__":[]})", 0)),
              HasSubstr("__metadata__ must be an object, got an array"));
  std::string ones = "1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  EXPECT_THAT(tensor_error("{\"shape\":[" + ones + "]}"), HasSubstr("at most 64 integers"));
}

TEST(Safetensors, SizesAndOffsetsAreChecked) {
  EXPECT_THAT(
      tensor_error(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"),
      HasSubstr("shape must give a whole number of bytes below 2^60"));
  EXPECT_THAT(
      tensor_error(R"({"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]})"),
      HasSubstr("below 2^60"));
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","shape":[2],"data_offsets":[0,9]})"),
              HasSubstr("within the file's 8 data bytes, got [0, 9]"));
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"),
              HasSubstr("must be ordered"));
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})"),
              HasSubstr("must span 4 bytes, got [0, 8]"));
  EXPECT_THAT(tensor_error(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
              HasSubstr("data must begin at byte 0 (no overlap, no hole), got 4"));
  EXPECT_THAT(error_of(file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                               R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                               8)),
              HasSubstr("tensor \"b\": data must begin at byte 8 (no overlap, no hole), got 4"));
}

TEST(Safetensors, TensorsAndMetadataAreBounded) {
  const auto items = [](size_t count, const std::string& value) {
    std::string text;
    for (size_t i = 0; i < count; ++i)
      text += (i ? ",\"" : "\"") + std::to_string(i) + "\":" + value;
    return text;
  };
  const std::string tensor = R"({"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  const auto file = [&](size_t count) { return file_of("{" + items(count, tensor) + "}", 0); };
  const size_t most = max_tensors(file(34000).size());
  EXPECT_LT(most, 34000u);
  EXPECT_EQ(error_of(file(34000)),
            "F: a file of this size must have at most " + std::to_string(most) + " tensors");
  EXPECT_EQ(parse(file(32768)).tensors.size(), 32768u);
  const auto metadata = [&](size_t count) {
    return file_of("{\"__metadata__\":{" + items(count, "\"\"") + "}}", 0);
  };
  EXPECT_EQ(parse(metadata(32768)).metadata.size(), 32768u);
  EXPECT_EQ(error_of(metadata(32769)), "F: __metadata__ must have at most 32768 keys");
}

TEST(Safetensors, TokensAreBounded) {
  for (const char* start : {"{\"t\": ", "{\""}) {
    EXPECT_EQ(error_of(file_of(start + std::string(65537, '9') + "\": {}}", 0)),
              "F: a name or number is longer than 65536 bytes");
  }
}

TEST(Safetensors, ErrorsShowHostileTextSafely) {
  const std::string message = tensor_error("{\"dtype\":\"" + std::string(1000, 'x') + "\"}");
  EXPECT_LT(message.size(), 250u);
  EXPECT_THAT(error_of(file_of("{\"a\\nb\": 1}", 0)), HasSubstr("tensor \"a?b\""));
}

TEST(Safetensors, WritesWhatItReads) {
  std::vector<TensorInfo> tensors = {{"b", DType::bf16, {3}, 0, 0},
                                     {"z\"\n", DType::f32, {2, 2}, 0, 0},
                                     {"a", DType::bf16, {0, 5}, 0, 0},
                                     {"m", DType::f64, {}, 0, 0}};
  const std::string text = format_header(tensors, {{"k", "v"}}, "F");
  EXPECT_EQ(text.size() % 8, 0u);
  const Header header = parse(text + std::string(tensors.back().end, '\0'));
  EXPECT_EQ(header.metadata, (std::map<std::string, std::string>{{"k", "v"}}));
  ASSERT_EQ(header.tensors.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(header.tensors[i].name, tensors[i].name);
    EXPECT_EQ(header.tensors[i].shape, tensors[i].shape);
    EXPECT_EQ(header.tensors[i].begin, tensors[i].begin);
  }
  EXPECT_EQ(tensors[0].name, "m");  // larger elements first: every tensor is aligned
  EXPECT_EQ(tensors[1].begin, 8u);
  EXPECT_EQ(tensors[2].name, "a");
}

TEST(Safetensors, WritingRefusesWhatCannotBeRead) {
  std::vector<TensorInfo> huge = {{"t", DType::f32, {int64_t{1} << 62}, 0, 0}};
  EXPECT_THROW(format_header(huge, {}, "F"), FileError);
  std::vector<TensorInfo> negative = {{"t", DType::f32, {-1}, 0, 0}};
  EXPECT_THROW(format_header(negative, {}, "F"), FileError);
  std::vector<TensorInfo> not_text = {{"\xFF", DType::f32, {1}, 0, 0}};
  EXPECT_EQ(message_of<FileError>([&] { format_header(not_text, {}, "F"); }),
            "F: tensor names and metadata must be valid UTF-8");
}

}  // namespace
