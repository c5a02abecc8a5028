// The journal of a save: the one small file whose appearance makes a set of new files valid all at
// once.
//
// A save writes every file under a staged name, then renames the journal into place: from here on
// the new set counts. Then the staged files are renamed to their names and the journal is removed,
// so that a finished save leaves only the files themselves. A journal found by a reader or the next
// writer means that the save was interrupted (or runs).
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "posix_file.h"

namespace rankwise::io {

inline const std::string journal_name = ".rankwise-save.json";
std::string staged_name(const std::string& name);

struct JournalEntry {
  std::string name;
  FileState written;  ///< content of the new file
  std::optional<FileState>
      replaced;  ///< content of the file it takes the place of; none: there was no such file
};

std::string format_journal(const std::vector<JournalEntry>& entries);

/// Throw FileError naming the file when it is not a journal.
std::vector<JournalEntry> parse_journal(std::string_view text, const std::string& file);
std::vector<JournalEntry> read_journal(const File& file);

struct LocatedFile {
  File file;
  bool staged;  ///< not renamed yet
};

/// The files of the journal's save, each under the name it has reached. nullopt when the journal is
/// stale: another program has written, restored or removed a file since (it is neither the new one
/// nor the one to be replaced), so that the files under their own names are what counts. A staged
/// file is opened before the file it will become, so that a writer at work cannot hide both.
std::optional<std::vector<LocatedFile>> locate(const Directory& directory,
                                               const std::vector<JournalEntry>& entries);

}  // namespace rankwise::io
