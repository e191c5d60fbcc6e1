//! TLS in three of libpq's modes, none of which falls back to plain text by itself.
//!
//! tokio-postgres leaves certificates to the connector and knows no `sslmode=verify-full`, so the two settings
//! that say how a server is trusted, `sslmode` and `sslrootcert`, are taken out of the connection string here.
//! What the modes mean: <https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION>.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

/// How a connection is protected. Text form: `disable`, `require`, `verify-full`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Not at all: for Unix sockets, loopback addresses and networks that are trusted as a whole.
    Disable,
    /// Encrypted, but the certificate is not looked at: keeps out who listens, not who stands in between.
    Require,
    /// Encrypted, the certificate is from a trusted authority and is for the host of the connection string.
    VerifyFull,
}

impl FromStr for TlsMode {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<Self, TlsError> {
        match text {
            "disable" => Ok(Self::Disable),
            "require" => Ok(Self::Require),
            "verify-full" => Ok(Self::VerifyFull),
            other => Err(TlsError::UnknownMode(other.to_owned())),
        }
    }
}

impl fmt::Display for TlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "disable",
            Self::Require => "require",
            Self::VerifyFull => "verify-full",
        })
    }
}

/// The TLS settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// libpq's other modes are refused as well: `allow` and `prefer` go on in plain text when a server, or who
    /// stands in between, says so, and `verify-ca` does not ask whether it is the right server.
    #[error("`{0}` is not a TLS mode that is supported; use `disable`, `require` or `verify-full`")]
    UnknownMode(String),
    /// Trusted roots were given together with a mode that does not look at the certificate.
    #[error("`sslrootcert` has no meaning for the TLS mode `require`; use `verify-full`")]
    UnusedRoots,
    /// A percent-encoded value of the connection string is not UTF-8 or is cut off.
    #[error("the value of `{0}` in the connection string is not well percent-encoded")]
    Encoding(&'static str),
    /// The file of `sslrootcert` cannot be read, or holds something that is no certificate.
    #[error("cannot read root certificates from {}", path.display())]
    RootFile {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file of `sslrootcert` holds no certificate.
    #[error("there is no certificate in {}", .0.display())]
    EmptyRootFile(PathBuf),
    /// The system has no root certificates where its kind keeps them.
    #[error(
        "no root certificates were found on this system; install them (`ca-certificates`) or name a file with `sslrootcert`"
    )]
    NoSystemRoots(#[source] Option<Box<dyn std::error::Error + Send + Sync>>),
    /// The TLS library refused the set-up.
    #[error("the TLS library refused the set-up")]
    Library(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Who is trusted to say that a server is who it claims to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    /// What the operating system trusts.
    System,
    /// The certificates of a PEM file.
    File(PathBuf),
}

/// What a connection string says about TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TlsSettings {
    pub(crate) mode: Option<TlsMode>,
    pub(crate) roots: Option<Roots>,
}

impl TlsSettings {
    /// The last of a name wins, as in libpq.
    fn set(&mut self, name: &'static str, value: &str) -> Result<(), TlsError> {
        match name {
            "sslmode" => self.mode = Some(value.parse()?),
            _ if value == "system" => self.roots = Some(Roots::System),
            _ => self.roots = Some(Roots::File(PathBuf::from(value))),
        }
        Ok(())
    }
}

/// The name if it is one of the settings that this module understands.
fn ours(name: &str) -> Option<&'static str> {
    ["sslmode", "sslrootcert"].into_iter().find(|ours| *ours == name)
}

/// Takes `sslmode` and `sslrootcert` out of a connection string. What else is wrong with the string is left for
/// tokio-postgres to say.
pub(crate) fn split_tls_settings(text: &str) -> Result<(String, TlsSettings), TlsError> {
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        split_url(text)
    } else {
        split_pairs(text)
    }
}

fn split_url(url: &str) -> Result<(String, TlsSettings), TlsError> {
    let mut settings = TlsSettings::default();
    let Some((base, query)) = url.split_once('?') else {
        return Ok((url.to_owned(), settings));
    };
    let mut kept = Vec::new();
    for parameter in query.split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match ours(name) {
            Some(name) => settings.set(name, &percent_decode(value).ok_or(TlsError::Encoding(name))?)?,
            None => kept.push(parameter),
        }
    }
    let kept = kept.join("&");
    let rest = if kept.is_empty() {
        base.to_owned()
    } else {
        format!("{base}?{kept}")
    };
    Ok((rest, settings))
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// `key = value` pairs; a value is a word or stands in single quotes, and a backslash takes the next character
/// as it is. <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE>
fn split_pairs(text: &str) -> Result<(String, TlsSettings), TlsError> {
    let mut settings = TlsSettings::default();
    let mut kept = String::new();
    let mut rest = text;
    loop {
        let start = rest.trim_start();
        let Some((name, after)) = start.split_once('=') else {
            kept.push_str(start);
            return Ok((kept, settings));
        };
        let (value, end) = value(after.trim_start());
        match ours(name.trim_end()) {
            Some(name) => settings.set(name, &value)?,
            None => {
                let pair = &start[..start.len() - end.len()];
                kept.push_str(pair);
                kept.push(' ');
            }
        }
        rest = end;
    }
}

/// The value at the start of a text, and what follows it.
fn value(text: &str) -> (String, &str) {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((index, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return (value, &text[index + 1..]),
            space if !quoted && space.is_whitespace() => return (value, &text[index..]),
            other => value.push(other),
        }
    }
    (value, "")
}

/// What makes the TLS streams of all connections. Roots are read once, here, and only where they are needed.
pub(crate) fn connector(mode: TlsMode, roots: Option<&Roots>) -> Result<MakeRustlsConnect, TlsError> {
    // Given explicitly: without, rustls panics as soon as another crate of the program turns on a second one.
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Library(error.into()))?;
    let builder = match (mode, roots) {
        (TlsMode::Disable, _) => builder.with_root_certificates(RootCertStore::empty()),
        (TlsMode::Require, None) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider))),
        (TlsMode::Require, Some(_)) => return Err(TlsError::UnusedRoots),
        (TlsMode::VerifyFull, None | Some(Roots::System)) => builder.with_root_certificates(system_roots()?),
        (TlsMode::VerifyFull, Some(Roots::File(path))) => builder.with_root_certificates(roots_of(path)?),
    };
    Ok(MakeRustlsConnect::new(builder.with_no_client_auth()))
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A system may well have a few that are too old to be understood.
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        return Err(TlsError::NoSystemRoots(
            found.errors.into_iter().next().map(Into::into),
        ));
    }
    Ok(roots)
}

fn roots_of(path: &Path) -> Result<RootCertStore, TlsError> {
    let failed = |source| TlsError::RootFile {
        path: path.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| failed(error.into()))? {
        let certificate = certificate.map_err(|error| failed(error.into()))?;
        roots.add(certificate).map_err(|error| failed(error.into()))?;
    }
    if roots.is_empty() {
        Err(TlsError::EmptyRootFile(path.to_owned()))
    } else {
        Ok(roots)
    }
}

/// Takes any certificate, but still has the server prove that it owns the one it shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &str) -> (String, Option<TlsMode>, Option<Roots>) {
        let (rest, settings) = split_tls_settings(text).unwrap();
        (rest, settings.mode, settings.roots)
    }

    fn file(path: &str) -> Option<Roots> {
        Some(Roots::File(path.into()))
    }

    #[test]
    fn a_url_loses_its_tls_settings_and_keeps_the_rest() {
        let plain = "postgres://u:p%3F@h/db";
        assert_eq!(split(plain), (plain.into(), None, None));
        assert_eq!(
            split("postgres://h/db?sslmode=verify-full&connect_timeout=3&sslrootcert=/a%20b.pem"),
            (
                "postgres://h/db?connect_timeout=3".into(),
                Some(TlsMode::VerifyFull),
                file("/a b.pem")
            )
        );
        assert_eq!(
            split("postgresql://h/db?sslmode=disable&sslmode=require"),
            ("postgresql://h/db".into(), Some(TlsMode::Require), None)
        );
        assert_eq!(split("postgres://h/?sslrootcert=system").2, Some(Roots::System));
    }

    #[test]
    fn pairs_lose_their_tls_settings_and_keep_the_rest() {
        assert_eq!(
            split("host=h sslmode = 'verify-full'  password='a sslmode=require b' sslrootcert='/a\\' b.pem'"),
            (
                "host=h password='a sslmode=require b' ".into(),
                Some(TlsMode::VerifyFull),
                file("/a' b.pem")
            )
        );
        assert_eq!(
            split("host=h\tsslmode=disable"),
            ("host=h ".into(), Some(TlsMode::Disable), None)
        );
        assert_eq!(split(""), (String::new(), None, None));
        assert_eq!(split("nonsense"), ("nonsense".into(), None, None));
    }

    #[test]
    fn a_mode_that_may_end_in_plain_text_is_refused_by_name() {
        for mode in ["prefer", "allow", "verify-ca", "", "VERIFY-FULL"] {
            let error = split_tls_settings(&format!("postgres://h/db?sslmode={mode}")).unwrap_err();
            assert!(
                matches!(&error, TlsError::UnknownMode(named) if named == mode),
                "{error}"
            );
            assert!(error.to_string().contains("verify-full"), "{error}");
        }
    }

    #[test]
    fn a_bad_escape_is_refused() {
        for value in ["%", "%4", "%zz", "%ff"] {
            let error = split_tls_settings(&format!("postgres://h/db?sslrootcert={value}")).unwrap_err();
            assert!(matches!(error, TlsError::Encoding("sslrootcert")), "{error}");
        }
    }

    #[test]
    fn roots_without_a_mode_that_uses_them_are_refused() {
        let roots = Roots::File("/nowhere".into());
        assert!(matches!(
            connector(TlsMode::Require, Some(&roots)),
            Err(TlsError::UnusedRoots)
        ));
    }

    #[test]
    fn disable_reads_no_roots() {
        connector(TlsMode::Disable, Some(&Roots::File("/nowhere".into()))).unwrap();
    }

    #[test]
    fn a_file_without_certificates_is_refused_with_its_name() {
        let missing = Roots::File("/nowhere.pem".into());
        let error = connector(TlsMode::VerifyFull, Some(&missing)).err().unwrap();
        assert!(matches!(error, TlsError::RootFile { .. }) && error.to_string().contains("/nowhere.pem"));
        let other = Roots::File(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml").into());
        assert!(matches!(
            connector(TlsMode::VerifyFull, Some(&other)),
            Err(TlsError::EmptyRootFile(_))
        ));
    }

    #[test]
    fn modes_read_back() {
        for mode in [TlsMode::Disable, TlsMode::Require, TlsMode::VerifyFull] {
            assert_eq!(mode.to_string().parse::<TlsMode>().unwrap(), mode);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_split_or_refused(text in ".{0,60}") {
            drop(split_tls_settings(&text));
            drop(split_tls_settings(&format!("postgres://{text}")));
        }

        /// What tokio-postgres reads is the same with and without our settings around it.
        #[test]
        fn the_rest_means_the_same(password in "[^\0]{0,12}", before in any::<bool>()) {
            let quoted = password.replace('\\', "\\\\").replace('\'', "\\'");
            let pair = format!("password='{quoted}'");
            let text = if before { format!("sslmode=require {pair}") } else { format!("{pair} sslmode=require") };
            let (rest, settings) = split_tls_settings(&text).unwrap();
            prop_assert_eq!(settings.mode, Some(TlsMode::Require));
            let config: tokio_postgres::Config = rest.parse().unwrap();
            prop_assert_eq!(config.get_password(), Some(password.as_bytes()));
        }
    }
}
