// A set of files replaced as one, by the journal of save_journal.h. The order of the syncs is what
// the promise rests on.
#include "atomic_directory.h"

#include <rankwise/file_error.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "save_journal.h"

namespace rankwise::io {
namespace {

namespace fs = std::filesystem;

/// Creates the folder and its parents. Not by std::filesystem: libtorch.so exports its own, newer
/// copies of those functions, which crash on an older libstdc++.
void make_directory(const fs::path& path) {
  const auto make = [&] { return ::mkdir(path.c_str(), 0777) == 0; };
  const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path(".");
  bool made = make();
  if (!made && errno == ENOENT && parent != path) {
    make_directory(parent);
    made = make();
  }
  if (made) {
    Directory(parent).sync();
  } else if (errno != EEXIST) {
    throw FileError(path.string() +
                    ": cannot create the folder: " + std::generic_category().message(errno));
  }
}

/// Moves the staged files to their names and ends the save.
void finish(const Directory& directory, const std::vector<std::string>& staged) {
  for (const std::string& name : staged) directory.rename(staged_name(name), name);
  directory.sync();  // the journal must not vanish before the files have their names
  directory.remove(journal_name);
  directory.sync();
}

/// Completes an interrupted save, or drops its remains when other programs have written since.
void settle(const Directory& directory) {
  const std::optional<File> journal = directory.open(journal_name);
  if (!journal) return;
  const std::vector<JournalEntry> entries = read_journal(*journal);
  std::vector<std::string> staged;
  if (const auto located = locate(directory, entries)) {
    for (size_t i = 0; i < entries.size(); ++i) {
      if ((*located)[i].staged) staged.push_back(entries[i].name);
    }
  }
  finish(directory, staged);
  for (const JournalEntry& entry : entries) directory.remove(staged_name(entry.name));
}

/// Removes the files of a save that did not become valid.
class StagedFiles {
 public:
  explicit StagedFiles(const Directory& directory) : directory_(directory) {}
  StagedFiles(const StagedFiles&) = delete;
  StagedFiles& operator=(const StagedFiles&) = delete;
  ~StagedFiles() {
    // The journal was added last and is removed first: without it the rest means nothing.
    for (auto name = names_.rbegin(); name != names_.rend(); ++name) {
      try {
        directory_.remove(*name);
      } catch (const FileError&) {
        // The error that brought us here is the one to report.
      }
    }
  }

  File create(const std::string& name) {
    names_.push_back(name);
    return directory_.create(name);
  }
  void rename(const std::string& from, const std::string& to) {
    names_.push_back(to);
    directory_.rename(from, to);
  }
  void keep() { names_.clear(); }

 private:
  const Directory& directory_;
  std::vector<std::string> names_;
};

JournalEntry stage(const Directory& directory, StagedFiles& staged, const FileContent& content) {
  File file = staged.create(staged_name(content.name));
  for (const auto& piece : content.pieces) file.write(piece);
  file.sync();
  const std::optional<File> present = directory.open(content.name);
  return {content.name, file.state(), present ? std::optional(present->state()) : std::nullopt};
}

/// Opens files under their own names; nullopt when they changed while they were opened.
std::optional<std::vector<File>> open_present(const Directory& directory,
                                              std::span<const std::string> names,
                                              const std::optional<File>& journal) {
  const auto same = [](const std::optional<File>& a, const std::optional<File>& b) {
    return a.has_value() == b.has_value() && (!a || a->identity() == b->identity());
  };
  std::vector<std::optional<File>> opened;
  for (const std::string& name : names) opened.push_back(directory.open(name));
  // A writer that was at work is betrayed by its journal or, if it has finished, by a renamed file.
  if (!same(directory.open(journal_name), journal)) return std::nullopt;
  std::vector<File> files;
  for (size_t i = 0; i < names.size(); ++i) {
    if (!same(directory.open(names[i]), opened[i])) return std::nullopt;
    if (!opened[i]) throw FileError(directory.path_of(names[i]) + ": no such file");
    files.push_back(std::move(*opened[i]));
  }
  return files;
}

/// The files of the journal's save in the order of `names`; nullopt when it is stale or about other
/// files.
std::optional<std::vector<File>> open_journaled(const Directory& directory,
                                                std::span<const std::string> names,
                                                const File& journal) {
  const std::vector<JournalEntry> entries = read_journal(journal);
  auto located = locate(directory, entries);
  if (!located) return std::nullopt;
  std::vector<File> files;
  for (const std::string& name : names) {
    const auto entry = std::find_if(entries.begin(), entries.end(),
                                    [&](const JournalEntry& e) { return e.name == name; });
    if (entry == entries.end()) return std::nullopt;
    files.push_back(std::move((*located)[static_cast<size_t>(entry - entries.begin())].file));
  }
  return files;
}

}  // namespace

void write_file_set(const fs::path& directory_path, std::span<const FileContent> files) {
  make_directory(directory_path);
  const Directory directory(directory_path);
  directory.lock();
  settle(directory);

  StagedFiles staged(directory);
  std::vector<JournalEntry> entries;
  std::vector<std::string> names;
  for (const FileContent& content : files) {
    entries.push_back(stage(directory, staged, content));
    names.push_back(content.name);
  }
  const std::string text = format_journal(entries);
  File journal = staged.create(staged_name("journal"));
  journal.write(std::as_bytes(std::span(text)));
  journal.sync();
  directory.sync();  // the staged names must be on the disk before the journal that refers to them
  staged.rename(staged_name("journal"), journal_name);  // the new set is valid from here
  directory.sync();  // and the journal before the first file that changes
  staged.keep();
  finish(directory, names);
}

std::vector<File> open_file_set(const fs::path& directory_path,
                                std::span<const std::string> names) {
  const Directory directory(directory_path);
  constexpr int attempts = 1000;  // each one more means that a whole save happened meanwhile
  for (int i = 0; i < attempts; ++i) {
    const std::optional<File> journal = directory.open(journal_name);
    if (journal) {
      if (auto files = open_journaled(directory, names, *journal)) return std::move(*files);
    }
    if (auto files = open_present(directory, names, journal)) return std::move(*files);
  }
  throw FileError(directory.path() + ": cannot read: the folder keeps changing");
}

}  // namespace rankwise::io
