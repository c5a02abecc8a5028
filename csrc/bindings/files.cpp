// The file layer for Python: configurations, keys, folders, folding.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <rankwise/adapter_file.h>
#include <rankwise/adapter_fold.h>
#include <rankwise/tensor_file.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
using rankwise::AdapterConfig;
using rankwise::AdapterFile;
using rankwise::AdapterKey;
using rankwise::AdapterUpdate;
using rankwise::ModuleSettings;
using rankwise::PatternIndex;

namespace {

void bind_config(py::module_& m) {
  py::class_<AdapterConfig>(m, "AdapterConfig")
      .def(py::init<>())
      .def_readwrite("peft_type", &AdapterConfig::peft_type)
      .def_readwrite("rank", &AdapterConfig::rank)
      .def_readwrite("alpha", &AdapterConfig::alpha)
      .def_readwrite("dropout", &AdapterConfig::dropout)
      .def_readwrite("rslora", &AdapterConfig::rslora)
      .def_readwrite("fan_in_fan_out", &AdapterConfig::fan_in_fan_out)
      .def_readwrite("target_modules", &AdapterConfig::target_modules)
      .def_readwrite("modules_to_save", &AdapterConfig::modules_to_save)
      .def_readwrite("rank_pattern", &AdapterConfig::rank_pattern)
      .def_readwrite("alpha_pattern", &AdapterConfig::alpha_pattern)
      .def_readwrite("kept_directions", &AdapterConfig::kept_directions)
      .def_readwrite("allocation", &AdapterConfig::allocation)
      .def_readwrite("base_model_name_or_path", &AdapterConfig::base_model_name_or_path)
      .def_readwrite("task_type", &AdapterConfig::task_type)
      .def_readwrite("base_model_class", &AdapterConfig::base_model_class)
      .def_readwrite("parent_library", &AdapterConfig::parent_library)
      .def("rank_of", &AdapterConfig::rank_of)
      .def("alpha_of", &AdapterConfig::alpha_of)
      .def("scaling", &AdapterConfig::scaling);
  py::class_<ModuleSettings>(m, "ModuleSettings")
      .def(py::init<const AdapterConfig&>(), py::keep_alive<1, 2>())
      .def("rank_of", &ModuleSettings::rank_of)
      .def("alpha_of", &ModuleSettings::alpha_of)
      .def("scaling", &ModuleSettings::scaling);
  py::class_<PatternIndex>(m, "PatternIndex")
      .def(py::init<std::vector<std::string>>())
      .def("find", &PatternIndex::find);
  m.def("is_plain_pattern", &rankwise::is_plain_pattern);
  m.def("target_names", &rankwise::target_names, py::arg("layers"), py::arg("modules"));
}

void bind_key(py::module_& m) {
  py::class_<AdapterKey> key(m, "AdapterKey");
  py::enum_<AdapterKey::Part>(key, "Part")
      .value("lora_A", AdapterKey::Part::lora_A)
      .value("lora_B", AdapterKey::Part::lora_B)
      .value("embedding_A", AdapterKey::Part::embedding_A)
      .value("embedding_B", AdapterKey::Part::embedding_B)
      .value("triplet_A", AdapterKey::Part::triplet_A)
      .value("triplet_B", AdapterKey::Part::triplet_B)
      .value("triplet_E", AdapterKey::Part::triplet_E)
      .value("saved", AdapterKey::Part::saved);
  key.def(py::init([](std::string module, AdapterKey::Part part, std::string parameter) {
            return AdapterKey{std::move(module), part, std::move(parameter)};
          }),
          py::arg("module"), py::arg("part"), py::arg("parameter") = "")
      .def_readonly("module", &AdapterKey::module)
      .def_readonly("part", &AdapterKey::part)
      .def_readonly("parameter", &AdapterKey::parameter)
      .def("__str__", [](const AdapterKey& self) { return rankwise::to_string(self); });
  m.def("parse_adapter_key", &rankwise::parse_adapter_key);
}

void bind_file(py::module_& m) {
  using Beside = std::map<std::string, std::string>;
  py::class_<AdapterFile>(m, "AdapterFile")
      .def(py::init(
               [](AdapterConfig config, std::map<std::string, at::Tensor> tensors, Beside beside) {
                 return AdapterFile{std::move(config), std::move(tensors), {}, std::move(beside)};
               }),
           py::arg("config"), py::arg("tensors"), py::arg("beside") = Beside())
      .def_readonly("config", &AdapterFile::config)
      .def_readonly("tensors", &AdapterFile::tensors)
      .def_property_readonly("beside", [](const AdapterFile& self) {
        py::dict files;
        for (const auto& [name, bytes] : self.beside) files[py::str(name)] = py::bytes(bytes);
        return files;
      });
  m.def(
      "read_adapter",
      [](const std::filesystem::path& directory, const std::vector<std::string>& beside) {
        return released([&] { return rankwise::read_adapter(directory, beside); });
      },
      py::arg("directory"), py::arg("beside") = std::vector<std::string>());
  m.def("write_adapter", &rankwise::write_adapter, py::call_guard<py::gil_scoped_release>());
  m.def("format_tensors",
        [](const std::map<std::string, at::Tensor>& tensors, const std::string& file) {
          return py::bytes(rankwise::format_tensors(tensors, file));
        });
  m.def("parse_tensors", &rankwise::parse_tensors);
}

void bind_fold(py::module_& m) {
  py::class_<AdapterUpdate>(m, "AdapterUpdate")
      .def(py::init([](std::string module, at::Tensor lora_A, at::Tensor lora_B,
                       std::optional<at::Tensor> lora_E, double scaling, bool embedding) {
             return AdapterUpdate{std::move(module), std::move(lora_A),
                                  std::move(lora_B), lora_E.value_or(at::Tensor()),
                                  scaling,           embedding};
           }),
           py::arg("module"), py::arg("lora_A"), py::arg("lora_B"), py::arg("lora_E"),
           py::arg("scaling"), py::arg("embedding"))
      .def_readonly("module", &AdapterUpdate::module)
      .def_readonly("lora_A", &AdapterUpdate::lora_A)
      .def_readonly("lora_B", &AdapterUpdate::lora_B)
      .def_property_readonly("lora_E",
                             [](const AdapterUpdate& self) {
                               return self.lora_E.defined() ? std::optional(self.lora_E)
                                                            : std::nullopt;
                             })
      .def_readonly("scaling", &AdapterUpdate::scaling)
      .def_readonly("embedding", &AdapterUpdate::embedding);
  m.def("updates_of", &rankwise::updates_of, py::call_guard<py::gil_scoped_release>());
  m.def(
      "fold_adapter",
      py::overload_cast<const std::vector<AdapterUpdate>&, AdapterConfig>(&rankwise::fold_adapter),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_files(py::module_& m) {
  py::register_exception<rankwise::io::FileError>(m, "FileError");
  bind_config(m);
  bind_key(m);
  bind_file(m);
  bind_fold(m);
}
