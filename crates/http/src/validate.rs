//! [`Validate`]: the rules of an input that its types cannot say.

use crate::{FieldError, Problem};

/// What a handler takes from a body or a query: how large it may be, and which rules it must meet beyond those
/// of its types.
///
/// The JSON structs of an API should carry `#[serde(deny_unknown_fields)]`: a misspelt optional field is then
/// refused with its name instead of being ignored.
///
/// ```
/// use leasehold_http::{FieldError, Validate};
///
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Rename { title: String }
///
/// impl Validate for Rename {
///     fn validate(&self) -> Vec<FieldError> {
///         let ok = (1..=80).contains(&self.title.len());
///         if ok { vec![] } else { vec![FieldError::new("title", "1 to 80 bytes")] }
///     }
/// }
/// ```
pub trait Validate {
    /// The most bytes that a body may have: 1 MiB unless the type says otherwise.
    const MAX_BYTES: usize = 1024 * 1024;

    /// Every rule that is broken; none when all is well.
    fn validate(&self) -> Vec<FieldError> {
        Vec::new()
    }
}

/// 422 with every broken rule.
pub(crate) fn check(value: &impl Validate) -> Result<(), Problem> {
    let errors = value.validate();
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Problem::invalid(errors))
    }
}
