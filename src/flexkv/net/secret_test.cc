#include "flexkv/net/secret.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

namespace flexkv::net {
namespace {

const std::string kGood(Secret::kMinBytes, 's');

class SecretFile : public testing::Test {
 protected:
  std::string write(const std::string& text, mode_t mode = 0600) {
    const std::string path = testing::TempDir() + "/secret-" + std::to_string(++count_);
    std::filesystem::remove(path);
    std::ofstream(path) << text;
    EXPECT_EQ(::chmod(path.c_str(), mode), 0);
    return path;
  }

 private:
  int count_ = 0;
};

TEST_F(SecretFile, IsReadWithoutBlanksAtItsEnd) {
  const auto secret = Secret::from_file(write(kGood + " \r\n\n"));
  ASSERT_TRUE(secret.ok()) << secret.error().message;
  EXPECT_EQ(secret.value().derive("x"), Secret::from_text(kGood).value().derive("x"));
}

TEST_F(SecretFile, IsRefusedWhenOthersMayReadIt) {
  const auto refused = Secret::from_file(write(kGood, 0640));
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("chmod 600"), std::string::npos);
}

TEST_F(SecretFile, IsRefusedWhenShortLongOrMissing) {
  for (const std::string& text : {std::string(), kGood.substr(1) + "\n", std::string(Secret::kMaxBytes + 1, 's')}) {
    const auto refused = Secret::from_file(write(text));
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.error().message.find("openssl rand"), std::string::npos);
    EXPECT_EQ(refused.error().message.find("sss"), std::string::npos) << "a secret in a message";
  }
  EXPECT_EQ(Secret::from_file("/nowhere/secret").error().code, ErrorCode::kNotFound);
  EXPECT_FALSE(Secret::from_file("/tmp").ok());
}

TEST(Secret, DerivesAKeyForEachPurpose) {
  const Secret secret = Secret::from_text(kGood).value();
  EXPECT_NE(secret.derive("a"), secret.derive("b"));
  EXPECT_NE(secret.derive("a"), Secret::from_text(kGood + "!").value().derive("a"));
}

// RFC 5869, A.3, has no salt and no info either; its key material is shorter than what we take, so this is the same
// computed with Python's hmac: PRK = HMAC(32 zero bytes, secret), OKM = HMAC(PRK, "purpose" + 0x01).
TEST(Secret, DerivesWhatTheStandardSays) {
  const Secret::Key key = Secret::from_text("0123456789abcdef0123456789abcdef").value().derive("purpose");
  std::string hex;
  for (const unsigned char byte : key) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  EXPECT_EQ(hex, "1facd0ed0e5ba467242164494b8d6ebe946956f9b22e19376ab7721a4c426796");
}

}  // namespace
}  // namespace flexkv::net
