// The journal of a save: what is written is read, anything else is refused.
#include "io/save_journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>

#include <limits>

#include "temporary_folder.h"

namespace {

using namespace rankwise::io;

const FileState some_state{.size = 3, .checksum = std::numeric_limits<uint64_t>::max()};

/// The journal of one file "a", with a number in place of its size.
std::string journal_of_size(const std::string& size) {
  return R"({"files": [{"name": "a", "replaced": null, "written": {"checksum": 1, "size": )" +
         size + "}}]}";
}

std::string error_of(const std::string& text) {
  return message_of<FileError>([&] { parse_journal(text, "F"); });
}

TEST(SaveJournal, WhatIsWrittenIsRead) {
  const std::vector<JournalEntry> entries = {{"a", some_state, std::nullopt},
                                             {"b", {1, 0}, some_state}};
  const std::vector<JournalEntry> read = parse_journal(format_journal(entries), "F");
  ASSERT_EQ(read.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(read[i].name, entries[i].name);
    EXPECT_EQ(read[i].written, entries[i].written);
    EXPECT_EQ(read[i].replaced, entries[i].replaced);
  }
}

TEST(SaveJournal, NumbersMustFit) {
  EXPECT_EQ(parse_journal(journal_of_size("18446744073709551615"), "F")[0].written.size,
            std::numeric_limits<uint64_t>::max());
  for (const char* size : {"18446744073709551616", "-1", "1.5", "1e300", "true", "\"1\""}) {
    EXPECT_EQ(error_of(journal_of_size(size)),
              "F: not a save journal; delete it to read the folder as it is")
        << size;
  }
}

TEST(SaveJournal, EveryBitFlipIsReadOrRefused) {
  const std::string text = format_journal({{"a", some_state, some_state}});
  size_t refused = 0;
  for (size_t bit = 0; bit < 8 * text.size(); ++bit) {
    std::string flipped = text;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    try {
      EXPECT_EQ(parse_journal(flipped, "F").size(), 1u) << bit;
    } catch (const FileError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 4 * text.size());
}

TEST(SaveJournal, SizeIsBounded) {
  const TemporaryFolder folder;
  std::string text = format_journal({{"a", some_state, std::nullopt}});
  text.resize(65536, ' ');
  const auto read = [&] {
    std::ofstream(folder.path() / "journal") << text;
    return read_journal(*Directory(folder.path()).open("journal"));
  };
  EXPECT_EQ(read().size(), 1u);
  text += ' ';
  EXPECT_THAT(message_of<FileError>(read), testing::HasSubstr("not a save journal"));
}

TEST(SaveJournal, NamesMustStayInTheFolder) {
  for (const char* name : {"", "../a", "/a"}) {
    const std::string text = format_journal({{name, some_state, std::nullopt}});
    EXPECT_THAT(error_of(text), testing::HasSubstr("not a save journal")) << name;
  }
}

}  // namespace
