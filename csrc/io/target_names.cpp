// Short names for adapted layers, where they are clear.
#include <rankwise/adapter_config.h>

#include <set>

namespace rankwise {

std::vector<std::string> target_names(const std::vector<std::string>& layers,
                                      const std::vector<std::string>& modules) {
  const auto last = [](const std::string& path) { return path.substr(path.rfind('.') + 1); };
  const std::set<std::string> adapted(layers.begin(), layers.end());
  std::set<std::string> unclear, names;
  for (const std::string& module : modules)
    if (!adapted.contains(module)) unclear.insert(last(module));
  for (const std::string& layer : layers)
    names.insert(unclear.contains(last(layer)) ? layer : last(layer));
  return {names.begin(), names.end()};
}

}  // namespace rankwise
