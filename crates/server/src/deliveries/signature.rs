//! The header by which a receiver knows that an event comes from here, and when it was sent.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The name of the header.
pub(crate) const LEASEHOLD_SIGNATURE: &str = "leasehold-signature";

/// `t=<seconds since 1970>,v1=<HMAC-SHA256 of "<t>.<body>", in hexadecimal digits>`. The time is signed too, so that a
/// receiver can refuse what was recorded long ago.
pub(crate) fn sign(secret: &str, seconds: i64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a key may have any length");
    mac.update(format!("{seconds}.").as_bytes());
    mac.update(body);
    let digest = mac.finalize().into_bytes();
    let start = format!("t={seconds},v1=");
    digest
        .iter()
        .fold(start, |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac whsec_test`
    #[test]
    fn others_compute_the_same() {
        let signature = sign("whsec_test", 1_700_000_000, br#"{"a":1}"#);
        assert_eq!(
            signature,
            "t=1700000000,v1=38877139021993b830af32feea6e18a8da83eb2f6e49ee50bd9e4cf4ca4d3789"
        );
    }
}
