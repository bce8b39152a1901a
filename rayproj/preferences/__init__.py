"""What people prefer: a side-by-side study of several models' images as a small web application, and its analysis."""
