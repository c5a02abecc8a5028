// The journal of a save: its format, and finding the files it speaks of.
#include "save_journal.h"

#include <rankwise/file_error.h>

#include <nlohmann/json.hpp>

#include "bounded_json.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::json;

[[noreturn]] void refuse(const std::string& file) {
  throw FileError(file + ": not a save journal; delete it to read the folder as it is");
}

Json to_json(const std::optional<FileState>& state) {
  return state ? Json{{"size", state->size}, {"checksum", state->checksum}} : Json();
}

/// nlohmann's get<uint64_t>() converts any number; of one that does not fit the result is
/// undefined.
uint64_t to_unsigned(const Json& json, const std::string& file) {
  if (!json.is_number_unsigned()) refuse(file);
  return json.get<uint64_t>();
}

FileState to_state(const Json& json, const std::string& file) {
  return {.size = to_unsigned(json.at("size"), file),
          .checksum = to_unsigned(json.at("checksum"), file)};
}

}  // namespace

std::string staged_name(const std::string& name) {
  return ".rankwise-save." + name;
}

std::string format_journal(const std::vector<JournalEntry>& entries) {
  Json files = Json::array();
  for (const JournalEntry& entry : entries) {
    files.push_back({{"name", entry.name},
                     {"written", to_json(entry.written)},
                     {"replaced", to_json(entry.replaced)}});
  }
  return Json{{"note", "an interrupted save of an adapter; the next save completes it"},
              {"files", files}}
             .dump(2) +
         "\n";
}

std::vector<JournalEntry> parse_journal(std::string_view text, const std::string& file) {
  const Json json = parse_json_object(text, file).value;
  try {
    std::vector<JournalEntry> entries;
    for (const Json& item : json.at("files")) {
      JournalEntry entry{
          item.at("name").get<std::string>(), to_state(item.at("written"), file), {}};
      if (!item.at("replaced").is_null()) entry.replaced = to_state(item.at("replaced"), file);
      if (entry.name.empty() || entry.name.find('/') != std::string::npos) refuse(file);
      entries.push_back(std::move(entry));
    }
    return entries;
  } catch (const Json::exception&) {
    refuse(file);
  }
}

std::vector<JournalEntry> read_journal(const File& file) {
  constexpr uint64_t max_size = 65536;
  if (file.size() > max_size) refuse(file.path());
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return parse_journal(text, file.path());
}

std::optional<std::vector<LocatedFile>> locate(const Directory& directory,
                                               const std::vector<JournalEntry>& entries) {
  std::vector<LocatedFile> located;
  for (const JournalEntry& entry : entries) {
    std::optional<File> staged = directory.open(staged_name(entry.name));
    std::optional<File> present = directory.open(entry.name);
    const std::optional<FileState> state = present ? std::optional(present->state()) : std::nullopt;
    if (state == entry.written) {
      located.push_back({std::move(*present), false});
    } else if (state == entry.replaced && staged && staged->state() == entry.written) {
      located.push_back({std::move(*staged), true});
    } else {
      return std::nullopt;
    }
  }
  return located;
}

}  // namespace rankwise::io
