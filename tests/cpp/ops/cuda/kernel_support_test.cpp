// A device without kernels: one question, one warning, the reason in each answer.
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ops/cuda/kernel_support.h>

#include <stdexcept>
#include <vector>

namespace {

using rankwise::KernelSupport;
using testing::ElementsAre;
using testing::HasSubstr;

class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
  std::vector<std::string> messages;
};

TEST(KernelSupport, WarnsOnceForEachDeviceWithout) {
  std::vector<int> asked;
  KernelSupport support([&](c10::DeviceIndex device) {
    asked.push_back(device);
    return device == 1 ? "" : "this build has no kernels for sm_7" + std::to_string(device);
  });
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  for (int repeat = 0; repeat < 3; ++repeat) {
    EXPECT_EQ(support.missing(0), "this build has no kernels for sm_70");
    EXPECT_EQ(support.missing(1), "");
    EXPECT_EQ(support.missing(5), "this build has no kernels for sm_75");
  }
  EXPECT_THAT(asked, ElementsAre(0, 1, 5));
  EXPECT_THAT(warnings.messages,
              ElementsAre(HasSubstr("no kernels for sm_70 (cuda:0)"), HasSubstr("sm_75 (cuda:5)")));
}

TEST(KernelSupport, AsksAgainAfterAProbeThatThrew) {
  int calls = 0;
  KernelSupport support([&](c10::DeviceIndex) -> std::string {
    if (++calls == 1) throw std::runtime_error("the device is busy");
    return "";
  });
  EXPECT_THROW(support.missing(0), std::runtime_error);
  EXPECT_EQ(support.missing(0), "");
  EXPECT_EQ(calls, 2);
}

}  // namespace
