// adapter_config.json of AdaLoRA: PEFT's fields in and out, its scaling, boolean patterns.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "io/adapter_config.h"
#include "temporary_folder.h"

namespace {

using rankwise::AdapterConfig;
using rankwise::AllocationSettings;
using rankwise::io::FileError;
using rankwise::io::format_adapter_config;
using rankwise::io::parse_adapter_config;
using testing::HasSubstr;

/// A config with these further members.
AdapterConfig parse(const std::string& members, const std::string& total_step = "10") {
  const std::string start = R"({"peft_type": "ADALORA", "total_step": )" + total_step + ", ";
  return parse_adapter_config(start + members + R"("end": 0})", "F");
}

std::string error_of(const std::string& members, const std::string& total_step = "10") {
  return message_of<FileError>([&] { parse(members, total_step); });
}

AdapterConfig full_config() {
  AdapterConfig config;
  config.peft_type = "ADALORA";
  config.rank = 3;
  config.alpha = 32;
  config.dropout = 0.1;
  config.fan_in_fan_out = true;
  config.target_modules = {"q", "v"};
  config.modules_to_save = {"score"};
  config.kept_directions = {{"h.0.q", {true, false, true}}, {"h.1.q", {false, false, false}}};
  config.allocation = AllocationSettings{.target_rank = 2,
                                         .total_steps = 100,
                                         .warmup_steps = 10,
                                         .final_steps = 20,
                                         .allocation_interval = 5,
                                         .beta1 = 0.5,
                                         .beta2 = 0.9,
                                         .orthogonality_weight = 0.25};
  config.task_type = "CAUSAL_LM";
  return config;
}

nlohmann::json written(const AdapterConfig& config) {
  return nlohmann::json::parse(format_adapter_config(config, "F"));
}

TEST(AdaLoRAConfig, DefaultsArePefts) {
  const AdapterConfig config = parse("");
  EXPECT_EQ(config.rank, 12);
  EXPECT_NEAR(config.scaling("q"), 8 / 12.00001, 1e-16);
  EXPECT_TRUE(config.kept_directions.empty());
  EXPECT_EQ(config.allocation, AllocationSettings{.total_steps = 10});
  EXPECT_EQ(parse(R"("rank_pattern": null, "unknown": [1], )"), config);
  EXPECT_EQ(parse(R"("rank_pattern": {}, )"), config);
}

TEST(AdaLoRAConfig, WhatPeftsAdaLoRAMakesNoUseOfIsIgnored) {
  EXPECT_EQ(parse(R"("r": 99, "use_rslora": true, "alpha_pattern": {"q": 3}, )"), parse(""));
}

TEST(AdaLoRAConfig, RoundTrip) {
  const AdapterConfig config = full_config();
  EXPECT_EQ(parse_adapter_config(format_adapter_config(config, "F"), "F"), config);
}

TEST(AdaLoRAConfig, WritesPeftsFields) {
  const nlohmann::json json = written(full_config());
  const nlohmann::json expected = {{"peft_type", "ADALORA"}, {"init_r", 3},
                                   {"target_r", 2},          {"tinit", 10},
                                   {"tfinal", 20},           {"deltaT", 5},
                                   {"beta1", 0.5},           {"beta2", 0.9},
                                   {"total_step", 100},      {"orth_reg_weight", 0.25}};
  for (const auto& [field, value] : expected.items()) EXPECT_EQ(json.at(field), value) << field;
  EXPECT_EQ(json.at("rank_pattern"), nlohmann::json::parse(R"({"h.0.q.lora_E": [true, false, true],
                                      "h.1.q.lora_E": [false, false, false]})"));
  for (const char* field : {"r", "use_rslora", "alpha_pattern"}) {
    EXPECT_FALSE(json.contains(field)) << field;
  }
  AdapterConfig whole = full_config();
  whole.kept_directions.clear();
  EXPECT_TRUE(written(whole).at("rank_pattern").is_null());
}

TEST(AdaLoRAConfig, RankAndScaling) {
  const AdapterConfig config = full_config();
  EXPECT_EQ(config.rank_of("h.0.q"), 2);
  EXPECT_EQ(config.rank_of("h.1.q"), 0);
  EXPECT_EQ(config.rank_of("h.2.q"), 3) << "not named: all kept";
  EXPECT_EQ(config.rank_of("x.h.0.q"), 3) << "whole names, not endings";
  for (const char* module : {"h.0.q", "h.1.q", "h.2.q"}) {
    EXPECT_EQ(config.alpha_of(module), 32);
    EXPECT_EQ(config.scaling(module), 32.0 / 3) << "pruning leaves the scaling alone";
  }
}

TEST(AdaLoRAConfig, TheFilesAlphaGivesPeftTheSameScaling) {
  for (const double alpha : {32.0, 1.0, 10.0, 0.5, 24.0, 0.001, 123456.789}) {
    for (const int64_t rank : {1, 3, 8, 12, 64, 1000}) {
      AdapterConfig config;
      config.peft_type = "ADALORA";
      config.alpha = alpha;
      config.rank = rank;
      const std::string text = format_adapter_config(config, "F");
      const auto stored = nlohmann::json::parse(text).at("lora_alpha").get<double>();
      const double scaling = alpha / static_cast<double>(rank);
      EXPECT_NEAR(stored / (static_cast<double>(rank) + 1e-5), scaling, 1e-11 * scaling);
      EXPECT_EQ(parse_adapter_config(text, "F").alpha, alpha) << alpha << " at rank " << rank;
    }
  }
}

TEST(AdaLoRAConfig, PeftsAlphaIsWrittenBackAsItWas) {
  for (const char* alpha : {"32", "8", "1", "10", "0.5", "12.25", "100000"}) {
    for (const char* rank : {"1", "3", "8", "12", "64"}) {
      const AdapterConfig config =
          parse(R"("lora_alpha": )" + std::string(alpha) + R"(, "init_r": )" + rank + ", ");
      EXPECT_NEAR(config.scaling("q"), std::stod(alpha) / (std::stod(rank) + 1e-5), 1e-13);
      const nlohmann::json stored = written(config).at("lora_alpha");
      EXPECT_EQ(stored, nlohmann::json::parse(alpha)) << alpha << " at rank " << rank;
    }
  }
  EXPECT_TRUE(written(parse(R"("lora_alpha": 32, )")).at("lora_alpha").is_number_integer());
}

TEST(AdaLoRAConfig, AnyAlphaSurvivesToTwelveDigits) {
  AdapterConfig config;
  config.peft_type = "ADALORA";
  config.alpha = 8 * std::acos(-1.0);
  config.rank = 7;
  const AdapterConfig read = parse_adapter_config(format_adapter_config(config, "F"), "F");
  EXPECT_NEAR(read.alpha, config.alpha, 1e-11 * config.alpha);
  EXPECT_EQ(parse_adapter_config(format_adapter_config(read, "F"), "F"), read) << "and no further";
}

TEST(AdaLoRAConfig, RangesAreChecked) {
  EXPECT_EQ(error_of(R"("init_r": 0, )"), "F: init_r must be in 1 .. 1048576, got 0");
  EXPECT_EQ(error_of(R"("init_r": 1048577, )"), "F: init_r must be in 1 .. 1048576, got 1048577");
  EXPECT_EQ(error_of(R"("lora_alpha": 0, )"),
            "F: lora_alpha must be in (0, 1e300) in AdaLoRA, got 0");
  EXPECT_THAT(error_of(R"("lora_alpha": -4, )"), HasSubstr("lora_alpha must be in (0, 1e300)"));
  EXPECT_EQ(error_of(R"("lora_dropout": 2, )"), "F: lora_dropout must be in [0, 1], got 2");
}

TEST(AdaLoRAConfig, TypesAreChecked) {
  EXPECT_EQ(error_of(R"("init_r": 1.5, )"), "F: init_r must be an integer, got number 1.5");
  EXPECT_EQ(error_of(R"("lora_alpha": "x", )"), "F: lora_alpha must be a number, got \"x\"");
  EXPECT_THAT(error_of(R"("use_dora": true, )"), HasSubstr("not supported: use_dora"));
  EXPECT_THAT(error_of(R"("bias": "all", )"), HasSubstr("bias must be \"none\""));
}

TEST(AdaLoRAConfig, OddSchedulesThatPeftTakesAreKeptAsTheyAre) {
  EXPECT_EQ(
      parse(R"("target_r": 13, "tinit": -4, "tfinal": 5, "deltaT": 0, "beta1": 1, )").allocation,
      (AllocationSettings{.target_rank = 13,
                          .total_steps = 10,
                          .warmup_steps = -4,
                          .final_steps = 5,
                          .allocation_interval = 0,
                          .beta1 = 1}));
  EXPECT_EQ(parse(R"("tinit": 4, "tfinal": 5, )").allocation->final_steps, 5);
  EXPECT_EQ(parse(R"("tinit": 4.0, )", "1e3").allocation,
            (AllocationSettings{.total_steps = 1000, .warmup_steps = 4}));
}

TEST(AdaLoRAConfig, SchedulesThatPeftRefusesAreNone) {
  EXPECT_FALSE(parse_adapter_config(R"({"peft_type": "ADALORA"})", "F").allocation);
  for (const char* total : {"null", "0", "-3", "1.5", "\"9\"", "9007199254740994", "1e300"})
    EXPECT_FALSE(parse("", total).allocation) << total;
  for (const char* members :
       {R"("tinit": 10, )", R"("tinit": 4, "tfinal": 6, )", R"("tinit": "x", )",
        R"("tfinal": 9223372036854775807, )", R"("deltaT": [1], )", R"("target_r": 2.5, )",
        R"("beta1": "x", )", R"("orth_reg_weight": -0.5, )"}) {
    const AdapterConfig config = parse(members);
    EXPECT_FALSE(config.allocation) << members;
    EXPECT_EQ(config.rank, 12);
  }
}

TEST(AdaLoRAConfig, WithoutAScheduleAPlaceholderIsWrittenAndReadAsNone) {
  AdapterConfig config = full_config();
  config.allocation.reset();
  const nlohmann::json json = written(config);
  const nlohmann::json expected = {{"init_r", 3}, {"target_r", 3}, {"tinit", 0},
                                   {"tfinal", 0}, {"deltaT", 1},   {"total_step", 1}};
  for (const auto& [field, value] : expected.items()) EXPECT_EQ(json.at(field), value) << field;
  EXPECT_EQ(parse_adapter_config(json.dump(), "F"), config);
}

TEST(AdaLoRAConfig, PatternsAreChecked) {
  const auto error = [](const std::string& pattern) {
    return error_of(R"("init_r": 2, "rank_pattern": )" + pattern + ", ");
  };
  EXPECT_EQ(error("[true]"), "F: rank_pattern must be an object, got array [true]");
  EXPECT_EQ(error(R"({"q.lora_E": 4})"),
            "F: rank_pattern \"q.lora_E\" must be a list of booleans, got number 4");
  EXPECT_EQ(error(R"({"q.lora_E": [true, 0]})"),
            "F: every item of rank_pattern \"q.lora_E\" must be a boolean, got number 0");
  for (const std::string length : {"[]", "[true]", "[true, true, true]"}) {
    EXPECT_THAT(error("{\"q.lora_E\": " + length + "}"),
                HasSubstr("rank_pattern \"q.lora_E\" must be a list of init_r = 2 booleans, got "));
  }
  for (const std::string key : {"q", "q.lora_A", ".lora_E", "lora_E", "q.lora_E.default"}) {
    EXPECT_EQ(error("{\"" + key + "\": [true, false]}"),
              "F: every key of rank_pattern must be <module>.lora_E, got \"" + key + "\"");
  }
  EXPECT_EQ(error(R"({"q.lora_E": [true, true], "q.lora_E": [true, true]})"),
            "F: key \"q.lora_E\" is given twice");
  EXPECT_THAT(parse_adapter_config(R"({"peft_type": "LORA"})", "F").kept_directions,
              testing::IsEmpty());
  EXPECT_EQ(message_of<FileError>([] {
              parse_adapter_config(R"({"peft_type": "LORA", "rank_pattern": {"q.lora_E": [true]}})",
                                   "F");
            }),
            "F: rank_pattern \"q.lora_E\" must be an integer, got array [true]");
}

TEST(AdaLoRAConfig, HostileSizes) {
  std::string many;
  for (int i = 0; i < 16384; ++i) many += "\"" + std::to_string(i) + ".lora_E\": [true], ";
  const std::string pattern = "\"rank_pattern\": {" + many + "\"a.lora_E\": [true]}, ";
  EXPECT_THAT(error_of("\"init_r\": 1, " + pattern), HasSubstr("at most 16384 entries, got 16385"));
  std::string items = "true";
  for (int i = 0; i < 500'000; ++i) items += ",true";
  EXPECT_THAT(error_of("\"rank_pattern\": {\"a.lora_E\": [" + items + "]}, "),
              HasSubstr("a list of init_r = 12 booleans, got 500001"));
  const std::string text = format_adapter_config(full_config(), "F");
  for (size_t size = 0; size + 1 < text.size(); ++size) {
    EXPECT_THROW(parse_adapter_config(text.substr(0, size), "F"), FileError) << size;
  }
}

TEST(AdaLoRAConfig, WritingChecksTheValues) {
  const auto error = [](const auto& change) {
    AdapterConfig config = full_config();
    change(config);
    return message_of<FileError>([&] { format_adapter_config(config, "F"); });
  };
  EXPECT_THAT(error([](auto& c) { c.rslora = true; }),
              HasSubstr("use_rslora must be false in AdaLoRA, got true"));
  EXPECT_THAT(error([](auto& c) {
                c.rank_pattern = {{"q", 2}};
              }),
              HasSubstr("rank_pattern must be of booleans in AdaLoRA, got ranks"));
  EXPECT_THAT(error([](auto& c) {
                c.alpha_pattern = {{"q", 2}};
              }),
              HasSubstr("alpha_pattern must be empty in AdaLoRA"));
  EXPECT_THAT(error([](auto& c) { c.kept_directions["h.0.q"].pop_back(); }),
              HasSubstr("\"h.0.q.lora_E\" must be a list of init_r = 3 booleans, got 2"));
  EXPECT_THAT(error([](auto& c) { c.alpha = -1; }), HasSubstr("lora_alpha must be in (0, 1e300)"));
  EXPECT_THAT(error([](auto& c) { c.alpha = std::nan(""); }), HasSubstr("must be finite, got nan"));
  const std::string total = "F: total_step must be at least 1 and more than tinit + tfinal = ";
  EXPECT_EQ(error([](auto& c) { c.allocation->total_steps = 30; }), total + "30, got 30");
  EXPECT_EQ(error([](auto& c) {
              c.allocation->warmup_steps = -40;
              c.allocation->total_steps = 0;
            }),
            total + "-20, got 0");
  EXPECT_EQ(error([](auto& c) { c.allocation->target_rank = (int64_t{1} << 53) + 1; }),
            "F: target_r must be within 2^53, got 9007199254740993");
  EXPECT_EQ(error([](auto& c) { c.allocation->beta2 = std::nan(""); }),
            "F: beta2 must be finite, got nan");
  EXPECT_EQ(error([](auto& c) {
              c.allocation->orthogonality_weight = std::numeric_limits<double>::infinity();
            }),
            "F: orth_reg_weight must be finite and at least 0, got inf");
  EXPECT_THAT(error([](auto& c) { c.peft_type = "LORA"; }),
              HasSubstr("kept_directions must be empty in LoRA"));
}

}  // namespace
