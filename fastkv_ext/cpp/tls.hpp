// A byte stream that speaks TLS, as its client. Knows nothing of RESP. Whoever includes this sees
// nothing of OpenSSL, because a build without it has tls_missing.cpp in the place of tls.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "stream.hpp"

namespace fastkv {

// What Python's SSLContext says, in OpenSSL's numbers and names. An empty text: not given.
struct TlsSettings {
  std::string server_name;  // a name, which is sent (SNI), or an IP address, which is not
  bool check_server_name = true;
  bool check_common_name = true;  // where a certificate has no other names
  bool wants_certificate = true;  // else anybody's server will do
  std::uint64_t verify_flags = 0;
  std::uint64_t options = 0;
  int min_version = 0;  // 0: the lowest, or highest, there is
  int max_version = 0;
  int security_level = 1;
  std::string ciphers;        // up to TLS 1.2
  std::string cipher_suites;  // of TLS 1.3
  // The system's certificate authorities; what cannot be read is ignored.
  std::string system_ca_file;
  std::string system_ca_path;
  std::string ca_file;
  std::string ca_path;
  std::string ca_data;  // PEM, or DER one after the other
  bool ca_data_is_pem = false;
  std::string certificate_file;
  std::string key_file;
  std::string_view password;  // of the key; the caller's memory, so that no copy is left behind
};

class TlsStream : public Stream {
 public:
  // Goes on with the handshake, before anything else is done. ok with bytes == 1: it is complete.
  virtual Moved handshake() noexcept = 0;
};

bool has_tls() noexcept;

// Over a duplicate of a connected socket. Throws std::runtime_error if OpenSSL does not take the
// settings.
std::unique_ptr<TlsStream> make_tls_stream(int socket, const TlsSettings& settings);

}  // namespace fastkv
