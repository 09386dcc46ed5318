"""The next policy and critic."""
