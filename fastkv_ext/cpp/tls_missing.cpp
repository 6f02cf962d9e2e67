// In the place of tls.cpp, where setup.py finds no OpenSSL 3 to build with.
#include <stdexcept>

#include "tls.hpp"

namespace fastkv {

bool has_tls() noexcept {
  return false;
}

std::unique_ptr<TlsStream> make_tls_stream(int /*socket*/, const TlsSettings& /*settings*/) {
  throw std::runtime_error("fastkv was built without OpenSSL");
}

}  // namespace fastkv
