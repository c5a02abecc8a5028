// The JSON of a safetensors header as a state machine on nlohmann's SAX events: anything but
// {"__metadata__": {text: text}, name: {"dtype": text, "shape": [n...], "data_offsets": [n, n]}}
// ends the parse.
#include "safetensors_json.h"

#include <rankwise/file_error.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "message_text.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::json;

class HeaderSax final : public nlohmann::json_sax<Json> {
 public:
  HeaderSax(size_t most_tensors, const std::string& file, Header& header)
      : most_tensors_(most_tensors), file_(file), header_(header) {}

  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_float(Json::number_float_t, const std::string& text) override {
    unexpected(shortened(text));
  }
  bool binary(Json::binary_t&) override { unexpected("binary"); }
  // nlohmann sends numbers with a minus sign here, all others to number_unsigned.
  bool number_integer(Json::number_integer_t value) override { unexpected(std::to_string(value)); }

  bool number_unsigned(Json::number_unsigned_t value) override {
    if (value > uint64_t{std::numeric_limits<int64_t>::max()}) unexpected(std::to_string(value));
    if (place_ == Place::shape_items && tensor().shape.size() < max_dimensions) {
      tensor().shape.push_back(static_cast<int64_t>(value));
    } else if (place_ == Place::offset_items && offsets_seen_ < 2) {
      (offsets_seen_++ == 0 ? tensor().begin : tensor().end) = value;
    } else {
      unexpected(std::to_string(value));
    }
    return true;
  }

  bool string(std::string& text) override {
    if (place_ == Place::metadata_value) {
      header_.metadata[metadata_key_] = text;
      place_ = Place::metadata;
    } else if (place_ == Place::dtype) {
      const std::optional<DType> dtype = parse_dtype(text);
      if (!dtype) fail(context() + "dtype must be a safetensors type, got " + in_quotes(text));
      tensor().dtype = *dtype;
      place_ = Place::tensor;
    } else {
      unexpected(in_quotes(text));
    }
    return true;
  }

  bool start_object(size_t) override {
    switch (place_) {
      case Place::before:
        place_ = Place::top;
        break;
      case Place::metadata_start:
        place_ = Place::metadata;
        break;
      case Place::tensor_start:
        place_ = Place::tensor;
        break;
      default:
        unexpected("an object");
    }
    return true;
  }

  bool key(std::string& text) override {
    if (place_ == Place::top) {
      top_key(text);
    } else if (place_ == Place::metadata) {
      if (header_.metadata.contains(text))
        fail("__metadata__ key " + in_quotes(text) + " is given twice");
      if (header_.metadata.size() == max_metadata)
        fail("__metadata__ must have at most " + std::to_string(max_metadata) + " keys");
      metadata_key_ = text;
      place_ = Place::metadata_value;
    } else {
      tensor_key(text);
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor && !(seen_.dtype && seen_.shape && seen_.offsets)) {
      fail(context() + "must have dtype, shape and data_offsets");
    }
    place_ = place_ == Place::top ? Place::after : Place::top;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ == Place::shape) {
      place_ = Place::shape_items;
    } else if (place_ == Place::offsets) {
      place_ = Place::offset_items;
    } else {
      unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offset_items && offsets_seen_ != 2) unexpected("the end of the array");
    place_ = Place::tensor;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    fail("the header is not valid JSON at byte " + std::to_string(position));
  }

 private:
  /// What the next token belongs to.
  enum class Place {
    before,
    top,
    metadata_start,
    metadata,
    metadata_value,
    tensor_start,
    tensor,
    dtype,
    shape,
    shape_items,
    offsets,
    offset_items,
    after,
  };

  TensorInfo& tensor() { return header_.tensors.back(); }

  void top_key(const std::string& text) {
    if (text == "__metadata__") {
      if (metadata_seen_) fail("__metadata__ is given twice");
      metadata_seen_ = true;
      place_ = Place::metadata_start;
      return;
    }
    if (header_.tensors.size() == most_tensors_) {
      fail("a file of this size must have at most " + std::to_string(most_tensors_) + " tensors");
    }
    header_.tensors.emplace_back().name = text;
    seen_ = {};
    offsets_seen_ = 0;
    place_ = Place::tensor_start;
  }

  void tensor_key(const std::string& text) {
    bool* seen = nullptr;
    if (text == "dtype") {
      seen = &seen_.dtype;
      place_ = Place::dtype;
    } else if (text == "shape") {
      seen = &seen_.shape;
      place_ = Place::shape;
    } else if (text == "data_offsets") {
      seen = &seen_.offsets;
      place_ = Place::offsets;
    } else {
      fail(context() + "must have only dtype, shape and data_offsets, got " + in_quotes(text));
    }
    if (*seen) fail(context() + in_quotes(text) + " is given twice");
    *seen = true;
  }

  std::string context() { return "tensor " + in_quotes(tensor().name) + ": "; }

  [[noreturn]] void unexpected(const std::string& got) {
    switch (place_) {
      case Place::before:
        fail("the header must be an object, got " + got);
      case Place::metadata_start:
        fail("__metadata__ must be an object, got " + got);
      case Place::metadata_value:
        fail("__metadata__ " + in_quotes(metadata_key_) + " must be a string, got " + got);
      case Place::tensor_start:
        fail(context() + "must be an object, got " + got);
      case Place::dtype:
        fail(context() + "dtype must be a string, got " + got);
      case Place::shape:
      case Place::shape_items:
        fail(context() + "shape must be an array of at most " + std::to_string(max_dimensions) +
             " integers in 0 .. 2^63 - 1, got " + got);
      default:
        fail(context() + "data_offsets must be two integers in 0 .. 2^63 - 1, got " + got);
    }
  }

  [[noreturn]] void fail(const std::string& reason) { throw FileError(file_ + ": " + reason); }

  const size_t most_tensors_;
  const std::string& file_;
  Header& header_;
  Place place_ = Place::before;
  bool metadata_seen_ = false;
  std::string metadata_key_;
  struct {
    bool dtype = false, shape = false, offsets = false;
  } seen_;  // members of the current tensor
  int offsets_seen_ = 0;
};

/// nlohmann copies a token several times before it hands it over, so its length is limited first.
void check_token_lengths(std::string_view json, const std::string& file) {
  constexpr size_t longest = 65536;
  size_t start = 0;
  while (start < json.size()) {
    const size_t end = std::min(json.find_first_of("{}[]:,\" \n", start), json.size());
    if (end - start > longest) {
      throw FileError(file + ": a name or number is longer than " + std::to_string(longest) +
                      " bytes");
    }
    start = end + 1;
  }
}

}  // namespace

void parse_header_json(std::string_view json, size_t most_tensors, const std::string& file,
                       Header& header) {
  if (json.empty() || json.front() != '{')
    throw FileError(file + ": the header must start with '{'");
  check_token_lengths(json, file);
  HeaderSax sax(most_tensors, file, header);
  Json::sax_parse(json.data(), json.data() + json.size(), &sax);
}

}  // namespace rankwise::io
