// save_checkpoint and load_checkpoint: the parts of a training as one state beside its adapter.
//
//   training.json         {"dict": [["format", "C++ 1"], [fact, value], ...]}, a fact a line: what
//                         must be the same for a state to fit
//   training.safetensors  model.<tensor>, optimizer.<...>, allocator.<...>, random.cpu,
//                         random.cuda.<device>, step
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/util/Type.h>
#include <rankwise/checkpoint.h>
#include <rankwise/module_adapters.h>
#include <rankwise/tensor_file.h>

#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "optimizer_state.h"
#include "training_tensors.h"

namespace rankwise {
namespace {

constexpr const char* structure_name = "training.json";
constexpr const char* tensors_name = "training.safetensors";
// Python's format is a number: each language refuses the other's.
constexpr const char* begin = "{\"dict\": [\n[\"format\", \"C++ 1\"]";
constexpr const char* end = "\n]}\n";

using Facts = std::map<std::string, std::string>;

// As in JSON; no line breaks.
std::string escaped(const std::string& text) {
  std::ostringstream result;
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result << '\\' << c;
    } else if (code < 0x20) {
      result << "\\u00"
             << "0123456789abcdef"[code >> 4] << "0123456789abcdef"[code & 15];
    } else {
      result << c;
    }
  }
  return result.str();
}

std::string text_of(const Facts& facts) {
  std::string text = begin;
  for (const auto& [name, value] : facts) text += ",\n[\"" + name + "\", \"" + value + "\"]";
  return text + end;
}

// Of a text_of(): what is none of its lines is no fact.
Facts facts_in(const std::string& text, const std::string& file) {
  if (!text.starts_with(begin) || !text.ends_with(end))
    throw io::FileError(file +
                        ": must be what save_checkpoint writes in C++ (format \"C++ 1\"), got "
                        "another file; checkpoints of Python are for its load_checkpoint");
  Facts facts;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t middle = line.find("\", \""), last = line.rfind("\"]");
    if (!line.starts_with("[\"") || middle == line.npos || last == line.npos) continue;
    facts[line.substr(2, middle - 2)] = line.substr(middle + 4, last - middle - 4);
  }
  facts.erase("format");
  return facts;
}

Facts facts_of(const std::string& owner, const torch::optim::Optimizer& optimizer,
               const Allocator* allocator, const TrainingTensors& tensors) {
  Facts facts;
  facts["optimizer"] = optimizer_kind(owner, optimizer);
  facts["allocator"] = allocator ? c10::demangle(typeid(*allocator).name()) : "none";
  for (const auto& [path, adapters] : tensors.adapters())
    facts["adapters of " + escaped(path)] = escaped(adapters);
  const auto& groups = optimizer.param_groups();
  for (size_t i = 0; i < groups.size(); ++i) {
    std::string names;
    for (const at::Tensor& parameter : groups[i].params()) {
      if (!names.empty()) names += ' ';
      names += escaped(tensors.name_of(parameter));
    }
    facts["parameters of group " + std::to_string(i)] = names;
  }
  return facts;
}

void compare(const Facts& stored, const Facts& here, Faults& faults) {
  const auto value = [](const Facts& facts, const std::string& name) {
    const auto found = facts.find(name);
    return found == facts.end() ? "none" : found->second;
  };
  Facts all = stored;
  all.insert(here.begin(), here.end());
  for (const auto& [name, one] : all) {
    const std::string then = value(stored, name), now = value(here, name);
    if (then == now) continue;
    const bool long_list = then.size() + now.size() > 300;
    faults.push_back(name + (long_list
                                 ? ": must be those of the checkpoint, in the same order"
                                 : ": the checkpoint has " + then + ", the training here " + now));
  }
}

void add(const std::string& prefix, const NamedTensors& part, NamedTensors& all) {
  for (const auto& [name, tensor] : part) all[prefix + name] = tensor;
}

NamedTensors part_of(const NamedTensors& all, const std::string& prefix) {
  NamedTensors part;
  for (auto it = all.lower_bound(prefix); it != all.end() && it->first.starts_with(prefix); ++it)
    part[it->first.substr(prefix.size())] = it->second;
  return part;
}

// torch's default generators by their names in the state.
std::map<std::string, at::Generator> generators(bool cuda) {
  std::map<std::string, at::Generator> result = {{"cpu", at::detail::getDefaultCPUGenerator()}};
  const int64_t devices = cuda ? at::detail::getCUDAHooks().getNumGPUs() : 0;
  for (int64_t i = 0; i < devices; ++i) {
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(i));
    result["cuda." + std::to_string(i)] = at::globalContext().defaultGenerator(device);
  }
  return result;
}

NamedTensors random_state(bool cuda) {
  NamedTensors state;
  for (auto& [name, generator] : generators(cuda)) {
    const std::lock_guard lock(generator.mutex());
    state[name] = generator.get_state();
  }
  return state;
}

// States of devices that are not here are left alone.
void set_random_state(const NamedTensors& stored, bool cuda) {
  for (auto& [name, generator] : generators(cuda)) {
    const auto found = stored.find(name);
    if (found == stored.end()) continue;
    const std::lock_guard lock(generator.mutex());
    at::Generator own = generator;
    own.set_state(found->second);
  }
}

void check_random_state(const NamedTensors& stored, Faults& faults) {
  try {
    at::detail::createCPUGenerator().set_state(stored.at("cpu"));
  } catch (const std::exception&) {
    faults.push_back("random.cpu: must be a state of torch's generator");
  }
}

int64_t step_in(const NamedTensors& state, Faults& faults) {
  const auto found = state.find("step");
  if (found != state.end() && found->second.scalar_type() == at::kLong &&
      found->second.numel() == 1)
    return found->second.item<int64_t>();
  faults.push_back("step: must be an integer");
  return 0;
}

}  // namespace

void save_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                     const torch::optim::Optimizer& optimizer, const Allocator* allocator,
                     int64_t step) {
  const TrainingTensors tensors("save_checkpoint", model, optimizer);
  const Facts facts = facts_of("save_checkpoint", optimizer, allocator, tensors);
  NamedTensors state = {{"step", at::scalar_tensor(step, at::kLong)}};
  add("model.", tensors.state(), state);
  add("optimizer.", optimizer_state(optimizer, tensors), state);
  if (allocator) add("allocator.", allocator->state(), state);
  add("random.", random_state(tensors.on_cuda()), state);
  const std::map<std::string, std::string> beside = {
      {structure_name, text_of(facts)}, {tensors_name, format_tensors(state, tensors_name)}};
  try {
    save_adapter(model, directory, {}, beside);
  } catch (const std::invalid_argument&) {  // AdaLoRA with several initial ranks or alphas?
    const std::exception_ptr first = std::current_exception();
    try {
      export_lora(model, directory, {}, beside);
    } catch (const std::invalid_argument&) {
      std::rethrow_exception(first);
    }
  }
}

int64_t load_checkpoint(const std::filesystem::path& directory, torch::nn::Module& model,
                        torch::optim::Optimizer& optimizer, Allocator* allocator) {
  const TrainingTensors tensors("load_checkpoint", model, optimizer);
  const Facts here = facts_of("load_checkpoint", optimizer, allocator, tensors);
  const AdapterFile file = read_adapter(directory, {structure_name, tensors_name});
  const std::string folder = directory.string() + "/";
  Faults faults;
  compare(facts_in(file.beside.at(structure_name), folder + structure_name), here, faults);
  const bool same_parts = faults.empty();
  const NamedTensors state = parse_tensors(file.beside.at(tensors_name), folder + tensors_name);
  const NamedTensors stored = part_of(state, "model."), random = part_of(state, "random.");
  tensors.check(stored, faults);
  check_random_state(random, faults);
  const int64_t step = step_in(state, faults);
  std::optional<ReadOptimizer> read;
  if (same_parts) read.emplace(part_of(state, "optimizer."), optimizer, tensors, faults);
  if (!faults.empty()) {
    std::string list;
    for (const std::string& fault : faults) list += "\n  " + fault;
    throw io::FileError("load_checkpoint: " + directory.string() +
                        " does not fit the training:" + list);
  }
  if (allocator) allocator->load_state(part_of(state, "allocator."));  // or changes nothing
  tensors.load(stored);
  read->put_into(optimizer);
  set_random_state(random, tensors.on_cuda());
  return step;
}

}  // namespace rankwise
