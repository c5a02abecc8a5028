// adapter_config.json: PEFT's fields in and out, refusals by name, ranks and scaling.
#include "io/adapter_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "temporary_folder.h"

namespace {

using rankwise::AdapterConfig;
using rankwise::io::FileError;
using rankwise::io::format_adapter_config;
using rankwise::io::parse_adapter_config;
using testing::ElementsAre;
using testing::HasSubstr;

/// A config with these further members.
AdapterConfig parse(const std::string& members) {
  return parse_adapter_config(R"({"peft_type": "LORA", )" + members + R"("end": 0})", "F");
}

std::string error_of(const std::string& members) {
  return message_of<FileError>([&] { parse(members); });
}

AdapterConfig full_config() {
  AdapterConfig config;
  config.rank = 4;
  config.alpha = 2.5;
  config.dropout = 0.1;
  config.rslora = true;
  config.fan_in_fan_out = true;
  config.target_modules = {"q", "v"};
  config.exclude_modules_regex = ".*head";
  config.layers_to_transform = {0, 2};
  config.layers_pattern = {"layers"};
  config.modules_to_save = {"score"};
  config.rank_pattern = {{"v", 3}, {"layers\\.0\\..*", 0}, {"a", 1}};
  config.alpha_pattern = {{"v", 1.5}, {"a", 16}};
  config.base_model_name_or_path = "some/model";
  config.revision = "main";
  config.task_type = "CAUSAL_LM";
  config.base_model_class = "LlamaForCausalLM";
  config.parent_library = "transformers.models.llama.modeling_llama";
  return config;
}

TEST(AdapterConfig, DefaultsArePefts) {
  EXPECT_EQ(parse(""), AdapterConfig());
  EXPECT_EQ(
      parse(R"("rank_pattern": null, "target_modules": null, "use_dora": null, "unknown": [1], )"),
      AdapterConfig());
}

TEST(AdapterConfig, RoundTrip) {
  const AdapterConfig config = full_config();
  EXPECT_EQ(parse_adapter_config(format_adapter_config(config, "F"), "F"), config);
  EXPECT_EQ(parse_adapter_config(format_adapter_config(AdapterConfig(), "F"), "F"),
            AdapterConfig());
}

TEST(AdapterConfig, WritesPeftsFields) {
  const auto json = nlohmann::json::parse(format_adapter_config(full_config(), "F"));
  EXPECT_EQ(json.at("peft_type"), "LORA");
  EXPECT_EQ(json.at("r"), 4);
  EXPECT_EQ(json.at("lora_alpha"), 2.5);
  EXPECT_TRUE(json.at("alpha_pattern").at("a").is_number_integer());
  EXPECT_EQ(json.at("use_rslora"), true);
  EXPECT_EQ(json.at("bias"), "none");
  EXPECT_EQ(json.at("inference_mode"), true);
  EXPECT_EQ(json.at("auto_mapping").at("base_model_class"), "LlamaForCausalLM");
  EXPECT_EQ(json.at("auto_mapping").at("parent_library"),
            "transformers.models.llama.modeling_llama");
  EXPECT_EQ(json.at("peft_version"), "0.21.2");
  EXPECT_EQ(json.at("exclude_modules"), ".*head");
  const auto empty = nlohmann::json::parse(format_adapter_config(AdapterConfig(), "F"));
  EXPECT_TRUE(empty.at("target_modules").is_null());
  EXPECT_TRUE(empty.at("task_type").is_null());
  EXPECT_TRUE(empty.at("auto_mapping").is_null());
}

TEST(AdapterConfig, OtherMappingsOfClassesSayNothing) {
  for (const char* mapping :
       {"null", "[]", "\"x\"", "{}", R"({"AutoConfig": "a.B"})", R"({"base_model_class": "A"})",
        R"({"parent_library": "a"})", R"({"base_model_class": 1, "parent_library": "a"})"}) {
    EXPECT_EQ(parse("\"auto_mapping\": " + std::string(mapping) + ", "), AdapterConfig());
  }
}

TEST(AdapterConfig, ListsAndSingleStringsAreKeptApart) {
  EXPECT_THAT(parse(R"("target_modules": ["a", "b"], )").target_modules, ElementsAre("a", "b"));
  const AdapterConfig config =
      parse(R"("target_modules": "all-linear", "layers_to_transform": 3, "layers_pattern": "h", )");
  EXPECT_EQ(config.target_modules_regex, "all-linear");
  EXPECT_TRUE(config.target_modules.empty());
  EXPECT_THAT(config.layers_to_transform, ElementsAre(3));
  EXPECT_THAT(config.layers_pattern, ElementsAre("h"));
}

TEST(AdapterConfig, RankAndScaling) {
  AdapterConfig config;
  config.rank = 4;
  config.alpha = 8;
  config.rank_pattern = {{"v", 16}, {"h.0.v", 2}, {"dead", 0}, {"layers\\.[01]\\.q", 9}};
  config.alpha_pattern = {{"h.0.v", 3}};
  EXPECT_EQ(config.rank_of("q"), 4);
  EXPECT_EQ(config.rank_of("h.0.v"), 16) << "the first match wins";
  EXPECT_EQ(config.rank_of("x.layers.1.q"), 9);
  EXPECT_EQ(config.scaling("q"), 2);
  EXPECT_EQ(config.scaling("h.0.v"), 3.0 / 16);
  EXPECT_EQ(config.scaling("dead"), 0);
  config.rslora = true;
  EXPECT_EQ(config.scaling("x.layers.1.q"), 8 / std::sqrt(9.0));
}

TEST(AdapterConfig, AKeyEqualToTheNameCountsLast) {
  AdapterConfig config;
  config.rank_pattern = {{"a+b", 3}, {"aa", 5}};
  EXPECT_EQ(config.rank_of("a+b"), 3) << "dict.get(name), though the regex does not match it";
  config.rank_pattern = {{"a+b", 3}, {"a.b", 5}};
  EXPECT_EQ(config.rank_of("a+b"), 5);
}

TEST(AdapterConfig, OrderOfPatternsIsTheFiles) {
  EXPECT_EQ(parse(R"("rank_pattern": {"z": 1, "a": 2}, )").rank_pattern,
            (rankwise::PatternList<int64_t>{{"z", 1}, {"a", 2}}));
}

TEST(AdapterConfig, RangesAreChecked) {
  EXPECT_EQ(error_of(R"("r": 0, )"), "F: r must be in 1 .. 1048576, got 0");
  EXPECT_EQ(error_of(R"("r": 1000000000, )"), "F: r must be in 1 .. 1048576, got 1000000000");
  EXPECT_EQ(error_of(R"("rank_pattern": {"a": -1}, )"),
            "F: rank_pattern \"a\" must be in 0 .. 1048576, got -1");
  EXPECT_EQ(error_of(R"("lora_dropout": 1.5, )"), "F: lora_dropout must be in [0, 1], got 1.5");
  EXPECT_EQ(error_of(R"("lora_dropout": -0.1, )"), "F: lora_dropout must be in [0, 1], got -0.1");
  EXPECT_EQ(error_of(R"("lora_alpha": 1e999, )"), "F: not valid JSON, a number is out of range");
  EXPECT_EQ(parse(R"("r": 1048576, "lora_dropout": 1, "lora_alpha": -2.5, )").rank, 1048576);
}

TEST(AdapterConfig, TypesAreChecked) {
  EXPECT_EQ(error_of(R"("r": 8.0, )"), "F: r must be an integer, got number 8.0");
  EXPECT_EQ(error_of(R"("r": "8", )"), "F: r must be an integer, got \"8\"");
  EXPECT_EQ(error_of(R"("r": null, )"), "F: r must be an integer, got null");
  EXPECT_EQ(error_of(R"("r": 18446744073709551615, )"),
            "F: r must be an integer, got number 18446744073709551615");
  EXPECT_EQ(error_of(R"("lora_alpha": true, )"),
            "F: lora_alpha must be a number, got boolean true");
  EXPECT_EQ(error_of(R"("lora_dropout": "x", )"), "F: lora_dropout must be a number, got \"x\"");
  EXPECT_EQ(error_of(R"("use_rslora": 1, )"), "F: use_rslora must be a boolean, got number 1");
  EXPECT_EQ(error_of(R"("fan_in_fan_out": [], )"),
            "F: fan_in_fan_out must be a boolean, got array []");
  EXPECT_EQ(error_of(R"("target_modules": {}, )"),
            "F: target_modules must be a list of strings or a string, got object {}");
  EXPECT_EQ(error_of(R"("target_modules": [1], )"),
            "F: every item of target_modules must be a string, got number 1");
  EXPECT_EQ(error_of(R"("modules_to_save": "a", )"),
            "F: modules_to_save must be a list of strings, got \"a\"");
  EXPECT_EQ(error_of(R"("rank_pattern": [], )"), "F: rank_pattern must be an object, got array []");
  EXPECT_EQ(error_of(R"("rank_pattern": {"a": true}, )"),
            "F: rank_pattern \"a\" must be an integer, got boolean true");
  EXPECT_EQ(error_of(R"("alpha_pattern": {"a": []}, )"),
            "F: alpha_pattern \"a\" must be a number, got array []");
  EXPECT_EQ(error_of(R"("task_type": 1, )"), "F: task_type must be a string, got number 1");
  EXPECT_EQ(error_of(R"("layers_to_transform": ["a"], )"),
            "F: layers_to_transform must be an integer, got \"a\"");
}

TEST(AdapterConfig, OtherMethodsAreRefusedByName) {
  const auto error = [](const std::string& text) {
    return message_of<FileError>([&] { parse_adapter_config(text, "F"); });
  };
  EXPECT_EQ(error(R"({"peft_type": "LOHA"})"),
            "F: peft_type must be \"LORA\" or \"ADALORA\", got \"LOHA\"");
  EXPECT_EQ(error("{}"), "F: peft_type must be \"LORA\" or \"ADALORA\", got \"\"");
  EXPECT_EQ(error_of(R"("bias": "lora_only", )"), "F: bias must be \"none\", got \"lora_only\"");
  EXPECT_EQ(error_of(R"("use_dora": true, "layer_replication": [[0, 1]], )"),
            "F: not supported: use_dora (DoRA rescales the adapted weight); "
            "layer_replication (the base model's layers are repeated)");
}

TEST(AdapterConfig, EveryActiveFeatureIsRefusedAndInactiveOnesAreNot) {
  const std::pair<const char*, const char*> features[] = {
      {"use_dora", "true"},
      {"lora_bias", "true"},
      {"use_qalora", "true"},
      {"ensure_weight_tying", "true"},
      {"layer_replication", "[[0,1]]"},
      {"target_parameters", "[\"w\"]"},
      {"trainable_token_indices", "{\"e\":[1]}"},
      {"alora_invocation_tokens", "[1]"},
      {"megatron_config", "{\"a\":1}"},
      {"arrow_config", "{}"},
      {"use_bdlora", "{}"},
      {"kasa_config", "{}"},
      {"velora_config", "{}"},
      {"monteclora_config", "{}"},
  };
  std::string inactive;
  for (const auto& [name, active] : features) {
    EXPECT_THAT(error_of(std::string("\"") + name + "\": " + active + ", "),
                HasSubstr(std::string("not supported: ") + name + " ("));
    inactive += std::string("\"") + name + "\": " + (*active == 't' ? "false" : "null") + ", ";
  }
  EXPECT_EQ(parse(inactive), AdapterConfig());
  EXPECT_EQ(parse(R"("target_parameters": [], "megatron_config": {}, "use_qalora": 0, )"),
            AdapterConfig());
}

TEST(AdapterConfig, UnknownOptionsInForceAreTold) {
  const auto unknown = [](const std::string& members) {
    std::vector<std::string> told;
    parse_adapter_config("{" + members + R"(, "target_modules": ["q"]})", "F", &told);
    return told;
  };
  const std::string lora = R"("peft_type": "LORA", "r": 8, "lora_alpha": 2)";
  EXPECT_THAT(unknown(lora + R"(, "a": 0, "b": true, "c": "x", "d": [1], "e": {"r": 2})"),
              ElementsAre("\"a\" = number 0", "\"b\" = boolean true", "\"c\" = \"x\"",
                          "\"d\" = array [1]", "\"e\" = object {\"r\":2}"));
  EXPECT_THAT(unknown(lora + R"(, "a": null, "b": false, "c": "", "d": [], "e": {})"),
              testing::IsEmpty());
  const std::string known = R"(, "peft_version": "1", "inference_mode": true, "megatron_core": "x",
      "auto_mapping": {"a": "b"}, "eva_config": {"rho": 2.0}, "qalora_group_size": 16)";
  EXPECT_THAT(unknown(lora + known), testing::IsEmpty());
  const std::string schedule = R"(, "init_r": 8, "tinit": 5, "total_step": 9, "beta1": 0.9)";
  EXPECT_EQ(unknown(lora + schedule).size(), 4) << "AdaLoRA's";
  const std::string adalora = R"("peft_type": "ADALORA", "r": 8, "alpha_pattern": {"a": 1})";
  EXPECT_THAT(unknown(adalora + schedule + known), testing::IsEmpty());
}

TEST(AdapterConfig, InitialisationsThatChangedTheBaseAreRefused) {
  for (const char* init :
       {"true", "false", "null", "\"gaussian\"", "\"eva\"", "\"orthogonal\"", "\"mica\""}) {
    EXPECT_EQ(parse("\"init_lora_weights\": " + std::string(init) + ", "), AdapterConfig());
  }
  for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new"}) {
    EXPECT_THAT(error_of("\"init_lora_weights\": \"" + std::string(init) + "\", "),
                HasSubstr("(others change the base weight), got \"" + std::string(init) + "\""));
  }
  EXPECT_THAT(error_of(R"("init_lora_weights": 1, )"), HasSubstr("got number 1"));
}

TEST(AdapterConfig, HostileJson) {
  const auto error = [](const std::string& text) {
    return message_of<FileError>([&] { parse_adapter_config(text, "F"); });
  };
  EXPECT_EQ(error(""), "F: not valid JSON at byte 1");
  EXPECT_EQ(error("[1]"), "F: must be a JSON object, got array [1]");
  EXPECT_EQ(error("{\"a\": " + std::string(100'000, '[')), "F: must be nested at most 32 deep");
  EXPECT_EQ(error(R"({"a": 1, "b": {"a": 1, "a": 2}})"), "F: key \"a\" is given twice");
  EXPECT_EQ(error(R"({"a": 1, "b": {"a": 1}, "a": 2})"), "F: key \"a\" is given twice");
  EXPECT_THAT(error("{\"a\": \"\xFF\"}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_of("\"rank_pattern\": {\"(?=a)\": 1}, "),
              HasSubstr("F: rank_pattern: pattern \"(?=a)\" has a group"));
  std::string many;
  for (int i = 0; i < 600; ++i) many += "\"[a-z]+" + std::to_string(i) + "\": 1, ";
  EXPECT_THAT(error_of("\"rank_pattern\": {" + many + "\"a\": 1}, "),
              HasSubstr("of fewer or simpler regular expressions"));
  many.clear();
  for (int i = 0; i < 16384; ++i) many += "\"" + std::to_string(i) + "\": 1, ";
  EXPECT_THAT(error_of("\"rank_pattern\": {" + many + "\"a\": 1}, "),
              HasSubstr("at most 16384 entries, got 16385"));
  const std::string text = format_adapter_config(full_config(), "F");
  for (size_t size = 0; size + 1 < text.size(); ++size) {
    EXPECT_THROW(parse_adapter_config(text.substr(0, size), "F"), FileError) << size;
  }
}

TEST(AdapterConfig, WritingChecksTheValues) {
  const auto error = [](const auto& change) {
    AdapterConfig config;
    change(config);
    return message_of<FileError>([&] { format_adapter_config(config, "F"); });
  };
  EXPECT_THAT(error([](auto& c) { c.peft_type = "LOHA"; }),
              HasSubstr("peft_type must be \"LORA\" or \"ADALORA\", got \"LOHA\""));
  EXPECT_THAT(error([](auto& c) { c.rank = 0; }), HasSubstr("r must be in"));
  EXPECT_THAT(error([](auto& c) { c.alpha = std::nan(""); }),
              HasSubstr("lora_alpha must be finite, got nan"));
  EXPECT_THAT(error([](auto& c) { c.dropout = std::nan(""); }),
              HasSubstr("lora_dropout must be in [0, 1], got nan"));
  EXPECT_THAT(error([](auto& c) {
                c.alpha_pattern = {{"a", std::numeric_limits<double>::infinity()}};
              }),
              HasSubstr("alpha_pattern \"a\" must be finite, got inf"));
  EXPECT_THAT(error([](auto& c) {
                c.rank_pattern = {{"a", 1}, {"a", 2}};
              }),
              HasSubstr("got \"a\" twice"));
  EXPECT_THAT(error([](auto& c) { c.target_modules = {"a"}, c.target_modules_regex = "b"; }),
              HasSubstr("got both"));
  EXPECT_THAT(error([](auto& c) { c.task_type = "\xFF"; }), HasSubstr("must be valid UTF-8"));
  EXPECT_THAT(error([](auto& c) { c.revision = std::string(4 << 20, 'x'); }),
              HasSubstr("at most 4194304 bytes"));
}

}  // namespace
