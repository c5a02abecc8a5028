// A set of files in a directory that is replaced as one: after a kill at any moment the old or the
// new set is read.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "posix_file.h"

namespace rankwise::io {

/// A file to write: its name, and its content as pieces written one after the other.
struct FileContent {
  std::string name;
  std::vector<std::span<const std::byte>> pieces;
};

/// Replaces or creates the files, all or none; creates the directory when missing and leaves other
/// files in it alone. An interrupted earlier save is completed first. Throws FileError naming the
/// path; then the old set is still in place and no new file is left behind. Only a failure after
/// the new set became valid leaves the new one, for the next save to complete. One writer at a
/// time: a second one gets an error.
void write_file_set(const std::filesystem::path& directory, std::span<const FileContent> files);

/// Opens the files of one save for reading, in the order of `names`; changes nothing. Files written
/// by other programs are taken as they are. Throws FileError naming the path when one is missing or
/// not a regular file.
std::vector<File> open_file_set(const std::filesystem::path& directory,
                                std::span<const std::string> names);

}  // namespace rankwise::io
