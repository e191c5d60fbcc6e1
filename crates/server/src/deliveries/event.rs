//! What is sent, and as what it waits for that.

use chrono::{DateTime, Utc};
use leasehold_domain::{NewWork, Scope};
use leasehold_http::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// The kind of the work.
pub(crate) const KIND: &str = "webhook_delivery";
const SCOPE_TYPE: &str = "webhook_event";
/// How often an event is sent to a webhook that does not take it.
pub(super) const MAX_ATTEMPTS: u32 = 10;

/// An event on the wire: the body of a delivery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Event {
    /// The same in every delivery of it, so that receivers notice one that comes twice.
    pub(super) id: Uuid,
    pub(super) r#type: String,
    pub(super) tenant_id: String,
    pub(super) created_at: String,
    pub(super) data: Value,
}

/// An event on its way to one webhook: the payload of a work item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Delivery {
    pub(super) webhook: Uuid,
    pub(super) event: Event,
}

impl Delivery {
    /// The work of sending it. There is one item for each webhook and event.
    pub(super) fn work(&self, at: DateTime<Utc>) -> serde_json::Result<NewWork> {
        let Self { webhook, event } = self;
        let scope = Scope::new(
            &event.tenant_id,
            KIND,
            SCOPE_TYPE,
            format!("{webhook}/{}", event.id),
        );
        Ok(NewWork::new(scope)
            .with_payload(serde_json::to_value(self)?)
            .with_event_at(at)
            .with_max_attempts(MAX_ATTEMPTS))
    }
}

/// As times are everywhere on the wire.
pub(super) fn written(at: DateTime<Utc>) -> String {
    Timestamp(at).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_body_has_its_members_in_order() {
        let event = Event {
            id: Uuid::nil(),
            r#type: "feedback_record.created".to_owned(),
            tenant_id: "acme".to_owned(),
            created_at: written(DateTime::UNIX_EPOCH),
            data: json!({"id": 1}),
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"id":"00000000-0000-0000-0000-000000000000","type":"feedback_record.created","tenant_id":"acme","created_at":"1970-01-01T00:00:00.000000Z","data":{"id":1}}"#
        );
        let delivery = Delivery {
            webhook: Uuid::max(),
            event,
        };
        let work = delivery.work(DateTime::UNIX_EPOCH).unwrap();
        work.validate().unwrap();
        assert_eq!(work.scope().tenant, "acme");
        let read: Delivery = serde_json::from_value(work.payload().unwrap().clone()).unwrap();
        assert_eq!(read, delivery);
    }
}
