// OpenSSL's ways, and what is made of them:
//
//   socket -> OpenSSL's buffer (kReadAhead) -> one record, decrypted in place -> caller's memory
//   caller's memory -> record_ (header and value together) -> one record -> socket
//
// What lies in OpenSSL's buffer does not make the descriptor readable: see Stream::holds_bytes.
#include "tls.hpp"

#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "fd.hpp"

namespace fastkv {
namespace {

// Ciphertext fetched by one system call. OpenSSL moves what it holds with every record.
constexpr std::size_t kReadAhead = std::size_t{64} << 10;
// What one call moves at most, so that a fast peer does not keep a worker in it.
constexpr std::size_t kMostBytes = std::size_t{1} << 20;
// Plaintext of a record.
constexpr std::size_t kRecordBytes = SSL3_RT_MAX_PLAIN_LENGTH;

template <auto free>
struct Free {
  void operator()(auto* object) const noexcept { free(object); }
};
using Context = std::unique_ptr<SSL_CTX, Free<SSL_CTX_free>>;
using Connection = std::unique_ptr<SSL, Free<SSL_free>>;
using Bio = std::unique_ptr<BIO, Free<BIO_free>>;
using Certificate = std::unique_ptr<X509, Free<X509_free>>;
using Octets = std::unique_ptr<ASN1_OCTET_STRING, Free<ASN1_OCTET_STRING_free>>;

// As Python writes it, "[SSL: WRONG_VERSION_NUMBER] wrong version number", for those who look for
// the name.
std::string reason_of(unsigned long error) {
  const char* const reason = ERR_reason_error_string(error);
  const std::string text = reason ? reason : "unknown TLS error";
  std::string name = text;
  for (char& c : name) {
    c = c == ' ' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return "[SSL: " + name + "] " + text;
}

void require(bool ok, const char* what) {
  if (ok) return;
  const unsigned long error = ERR_peek_last_error();
  ERR_clear_error();  // the thread's: Python's ssl must not find it there
  throw std::runtime_error(reason_of(error) + ": " + what);
}

const char* or_null(const std::string& text) noexcept {
  return text.empty() ? nullptr : text.c_str();
}

int give_password(char* to, int room, int /*encrypting*/, void* password) {
  const auto& text = *static_cast<const std::string_view*>(password);
  if (text.size() > static_cast<std::size_t>(room)) return -1;
  return static_cast<int>(text.copy(to, text.size()));
}

void trust_ca_data(SSL_CTX* context, const TlsSettings& settings) {
  const std::string& data = settings.ca_data;
  require(data.size() <= INT_MAX, "ca_data");
  const Bio bytes(BIO_new_mem_buf(data.data(), static_cast<int>(data.size())));
  require(bytes != nullptr, "ca_data");
  for (;;) {
    const Certificate one(settings.ca_data_is_pem
                              ? PEM_read_bio_X509(bytes.get(), nullptr, nullptr, nullptr)
                              : d2i_X509_bio(bytes.get(), nullptr));
    if (!one) break;  // the end: Python has parsed it all before us, and would have complained
    require(X509_STORE_add_cert(SSL_CTX_get_cert_store(context), one.get()) == 1, "ca_data");
  }
  ERR_clear_error();
}

void trust(SSL_CTX* context, const TlsSettings& settings) {
  if (const char* file = or_null(settings.system_ca_file)) SSL_CTX_load_verify_file(context, file);
  if (const char* path = or_null(settings.system_ca_path)) SSL_CTX_load_verify_dir(context, path);
  ERR_clear_error();
  if (!settings.ca_file.empty() || !settings.ca_path.empty()) {
    require(SSL_CTX_load_verify_locations(context, or_null(settings.ca_file),
                                          or_null(settings.ca_path)) == 1,
            "ca_certs, ca_path");
  }
  if (!settings.ca_data.empty()) trust_ca_data(context, settings);
}

void identify(SSL_CTX* context, const TlsSettings& settings) {
  if (settings.certificate_file.empty()) return;
  SSL_CTX_set_default_passwd_cb(context, give_password);
  SSL_CTX_set_default_passwd_cb_userdata(context,
                                         const_cast<std::string_view*>(&settings.password));
  require(SSL_CTX_use_certificate_chain_file(context, settings.certificate_file.c_str()) == 1,
          "certfile");
  const auto& key = settings.key_file.empty() ? settings.certificate_file : settings.key_file;
  require(SSL_CTX_use_PrivateKey_file(context, key.c_str(), SSL_FILETYPE_PEM) == 1, "keyfile");
  require(SSL_CTX_check_private_key(context) == 1, "keyfile");
  SSL_CTX_set_default_passwd_cb_userdata(context, nullptr);  // the settings do not live on
}

Context make_context(const TlsSettings& settings) {
  Context made(SSL_CTX_new(TLS_client_method()));
  require(made != nullptr, "SSL_CTX_new");
  SSL_CTX* const context = made.get();
  SSL_CTX_clear_options(context, SSL_CTX_get_options(context));
  SSL_CTX_set_options(context, settings.options | SSL_OP_ENABLE_KTLS);
  require(SSL_CTX_set_min_proto_version(context, settings.min_version) == 1, "minimum version");
  require(SSL_CTX_set_max_proto_version(context, settings.max_version) == 1, "maximum version");
  SSL_CTX_set_security_level(context, settings.security_level);
  if (!settings.ciphers.empty()) {
    require(SSL_CTX_set_cipher_list(context, settings.ciphers.c_str()) == 1, "ciphers");
  }
  require(SSL_CTX_set_ciphersuites(context, settings.cipher_suites.c_str()) == 1, "ciphers");
  SSL_CTX_set_verify(context, settings.wants_certificate ? SSL_VERIFY_PEER : SSL_VERIFY_NONE,
                     nullptr);
  X509_VERIFY_PARAM* const rules = SSL_CTX_get0_param(context);
  X509_VERIFY_PARAM_clear_flags(rules, X509_VERIFY_PARAM_get_flags(rules));
  X509_VERIFY_PARAM_set_flags(rules, settings.verify_flags);
  X509_VERIFY_PARAM_set_hostflags(
      rules, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS |
                 (settings.check_common_name ? 0u : X509_CHECK_FLAG_NEVER_CHECK_SUBJECT));
  trust(context, settings);
  identify(context, settings);
  SSL_CTX_set_read_ahead(context, 1);
  SSL_CTX_set_default_read_buffer_len(context, kReadAhead);
  return made;
}

class OpenSslStream final : public TlsStream {
 public:
  OpenSslStream(int socket, const TlsSettings& settings)
      : server_name_(settings.server_name), record_(std::make_unique<std::byte[]>(kRecordBytes)) {
    ERR_clear_error();
    make_non_blocking(socket);
    ssl_.reset(SSL_new(make_context(settings).get()));  // which it shares
    require(ssl_ != nullptr, "SSL_new");
    name_server(settings.check_server_name);
    // Last: a fork meanwhile, which does not know of us yet, would leave it to the child.
    socket_ = duplicate(socket);
    is_local_ = is_local(socket);
    require(SSL_set_fd(ssl_.get(), socket_.get()) == 1, "SSL_set_fd");
  }
  // No close_notify: a reply says its length, and its server should not wait for a goodbye.
  ~OpenSslStream() override {
    OPENSSL_cleanse(record_.get(), kRecordBytes);
    if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
  }

  int fd() const noexcept override { return socket_.get(); }
  int sender_cpu() const noexcept override { return is_local_ ? incoming_cpu(fd()) : -1; }
  Moved handshake() noexcept override;
  Moved read(std::span<const iovec> into) noexcept override;
  Moved write(std::span<const iovec> from) noexcept override;
  bool holds_bytes() const noexcept override {
    return !read_failure_.ok() || (!drained_ && SSL_has_pending(ssl_.get()) == 1);
  }
  bool crossed() const noexcept override { return read_crossed_ || write_crossed_; }
  void close_after_fork() noexcept override { socket_.reset(); }

 private:
  void name_server(bool check);
  Status explain(int result, const char* doing, int usual, bool& crossed) noexcept;
  Status tls_error() const;
  std::size_t fill_record(std::span<const iovec> from, std::size_t skip) noexcept;

  UniqueFd socket_;
  bool is_local_ = false;
  std::string server_name_;
  Connection ssl_;
  // OpenSSL wants to be given the same bytes again after it said "later".
  std::unique_ptr<std::byte[]> record_;
  std::size_t record_bytes_ = 0;
  bool drained_ = true;  // the last read has met the end of what there was
  bool read_crossed_ = false;
  bool write_crossed_ = false;
  Status read_failure_;
};

void OpenSslStream::name_server(bool check) {
  const char* const name = server_name_.c_str();
  X509_VERIFY_PARAM* const rules = SSL_get0_param(ssl_.get());
  const Octets address(a2i_IPADDRESS(name));
  ERR_clear_error();
  if (!address) require(SSL_set_tlsext_host_name(ssl_.get(), name) == 1, "server name");
  if (!check) return;
  const int set = address ? X509_VERIFY_PARAM_set1_ip_asc(rules, name)
                          : X509_VERIFY_PARAM_set1_host(rules, name, 0);
  require(set == 1, "server name");
}

Status OpenSslStream::tls_error() const {
  const unsigned long error = ERR_peek_last_error();
  ERR_clear_error();
  if (ERR_GET_LIB(error) == ERR_LIB_SSL &&
      ERR_GET_REASON(error) == SSL_R_UNEXPECTED_EOF_WHILE_READING) {
    return {Code::connection_lost, kClosedByServer};
  }
  std::string text = reason_of(error);
  if (ERR_GET_LIB(error) == ERR_LIB_SSL &&
      ERR_GET_REASON(error) == SSL_R_CERTIFICATE_VERIFY_FAILED) {
    const long why = SSL_get_verify_result(ssl_.get());
    std::string told = X509_verify_cert_error_string(why);
    if (why == X509_V_ERR_HOSTNAME_MISMATCH || why == X509_V_ERR_IP_ADDRESS_MISMATCH) {
      told[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(told[0])));
      told.append(", certificate is not valid for '").append(server_name_).append("'");
    }
    text.append(": ").append(told);
  }
  return {Code::connection_lost, text + "."};
}

// Why a call did not succeed; ok: it waits, for what calls of its kind usually wait or, `crossed`,
// for the other.
Status OpenSslStream::explain(int result, const char* doing, int usual, bool& crossed) noexcept {
  const int error_number = errno;
  const int error = SSL_get_error(ssl_.get(), result);
  crossed = false;
  try {
    switch (error) {
      case SSL_ERROR_WANT_READ:
      case SSL_ERROR_WANT_WRITE: crossed = error != usual; return {};
      case SSL_ERROR_ZERO_RETURN: return {Code::connection_lost, kClosedByServer};
      case SSL_ERROR_SYSCALL:
        if (error_number == 0) return {Code::connection_lost, kClosedByServer};
        errno = error_number;
        return failed(doing).status;
      default: return tls_error();
    }
  } catch (...) {
    return {Code::connection_lost, {}};
  }
}

Stream::Moved OpenSslStream::handshake() noexcept {
  ERR_clear_error();
  errno = 0;
  const int result = SSL_connect(ssl_.get());
  if (result == 1) return {1, {}};
  return {0, explain(result, "reading from", SSL_ERROR_WANT_READ, read_crossed_)};
}

Stream::Moved OpenSslStream::read(std::span<const iovec> into) noexcept {
  if (!read_failure_.ok()) return {0, read_failure_};
  drained_ = read_crossed_ = false;
  std::size_t total = 0;
  for (const iovec& part : into) {
    for (std::size_t at = 0; at < part.iov_len;) {
      if (total >= kMostBytes) return {total, {}};
      std::size_t count = 0;
      ERR_clear_error();
      errno = 0;
      const int result = SSL_read_ex(ssl_.get(), static_cast<std::byte*>(part.iov_base) + at,
                                     part.iov_len - at, &count);
      if (result != 1) {
        drained_ = true;
        read_failure_ = explain(result, "reading from", SSL_ERROR_WANT_READ, read_crossed_);
        // What came before it is good; the next read tells of the failure.
        if (total > 0) return {total, {}};
        return {0, read_failure_};
      }
      at += count;
      total += count;
    }
  }
  return {total, {}};
}

// Returns how many bytes it put in, of those behind the first `skip`.
std::size_t OpenSslStream::fill_record(std::span<const iovec> from, std::size_t skip) noexcept {
  std::size_t filled = 0;
  for (const iovec& part : from) {
    if (skip >= part.iov_len) {
      skip -= part.iov_len;
      continue;
    }
    const std::size_t size = std::min(kRecordBytes - filled, part.iov_len - skip);
    std::memcpy(record_.get() + filled, static_cast<const std::byte*>(part.iov_base) + skip, size);
    filled += size;
    skip = 0;
    if (filled == kRecordBytes) break;
  }
  return filled;
}

Stream::Moved OpenSslStream::write(std::span<const iovec> from) noexcept {
  write_crossed_ = false;
  std::size_t offered = 0;
  for (const iovec& part : from) offered += part.iov_len;
  for (std::size_t total = 0;;) {
    if (record_bytes_ == 0) record_bytes_ = fill_record(from, total);
    // A record that waits since an earlier call may be longer than what is offered this time.
    if (record_bytes_ == 0 || record_bytes_ > offered - total || total >= kMostBytes) {
      return {total, {}};
    }
    std::size_t count = 0;
    ERR_clear_error();
    errno = 0;
    const int result = SSL_write_ex(ssl_.get(), record_.get(), record_bytes_, &count);
    if (result != 1) {
      Status why = explain(result, "writing to", SSL_ERROR_WANT_WRITE, write_crossed_);
      if (total > 0) return {total, {}};
      return {0, std::move(why)};
    }
    // A full record is of a value; a shorter one may be a password.
    if (record_bytes_ < kRecordBytes) OPENSSL_cleanse(record_.get(), record_bytes_);
    total += std::exchange(record_bytes_, 0);
  }
}

}  // namespace

bool has_tls() noexcept {
  return true;
}

std::unique_ptr<TlsStream> make_tls_stream(int socket, const TlsSettings& settings) {
  return std::make_unique<OpenSslStream>(socket, settings);
}

}  // namespace fastkv
